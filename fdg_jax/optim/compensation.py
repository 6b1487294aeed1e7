"""Corrections of gradients that were computed at older weights.

They use the weights of the gradient's own forward, which `fdg_jax.Pipeline` passes to an
optimizer's ``update`` as ``stale_params``. With accumulation they apply to each gradient:
``StageOptimizer(per_gradient=delay_compensation(...), per_update=...)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class DelayCompensationState(NamedTuple):
    """State of `delay_compensation`.

    Attributes:
      mean_square: mean square of the gradient, per parameter; None unless adaptive.
    """

    mean_square: Any


def delay_compensation(
    lam: float, adaptive: bool = False, decay: float = 0.95, eps: float = 1e-7
) -> optax.GradientTransformationExtraArgs:
    r"""DC-ASGD: a first-order estimate of the gradient at the newest weights.

    .. math::
        g + \lambda \, g \odot g \odot (w_\text{now} - w_\text{then})

    The squared gradient approximates the diagonal of the Hessian.

    Args:
      lam: :math:`\lambda` >= 0; 0 changes nothing.
      adaptive: divides lam by the root mean square of the gradient.
      decay: decay of the mean square, 0 <= decay < 1.
      eps: added to it, > 0.

    Returns:
      An optax transformation whose ``update`` needs the extra argument ``stale_params``.

    Raises:
      ValueError: a number out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> correct = delay_compensation(0.5)
      >>> now, then = jnp.float32(3), jnp.float32(1)
      >>> float(correct.update(jnp.float32(2), correct.init(now), now, stale_params=then)[0])
      6.0

    References:
      Zheng et al., `Asynchronous Stochastic Gradient Descent with Delay Compensation
      <https://arxiv.org/abs/1609.08326>`_, 2017.
    """
    _check("lam", lam, lam >= 0, "0 or more")
    _check("decay", decay, 0 <= decay < 1, "in [0, 1)")
    _check("eps", eps, eps > 0, "more than 0")

    def init(params: Any) -> DelayCompensationState:
        zeros = jax.tree.map(jnp.zeros_like, params) if adaptive else None
        return DelayCompensationState(zeros)

    def update(
        updates: Any, state: DelayCompensationState, params: Any = None, **extra: Any
    ) -> tuple[Any, DelayCompensationState]:
        then = _stale("delay_compensation", params, extra)
        if not adaptive:
            correct = jax.tree.map(
                lambda g, now, old: g + lam * g * g * (now - old), updates, params, then
            )
            return correct, state
        mean = jax.tree.map(
            lambda m, g: decay * m + (1 - decay) * g * g, state.mean_square, updates
        )
        correct = jax.tree.map(
            lambda g, m, now, old: g + lam / jnp.sqrt(m + eps) * g * g * (now - old),
            *(updates, mean, params, then),
        )
        return correct, DelayCompensationState(mean)

    return optax.GradientTransformationExtraArgs(init, update)


class GapAwareState(NamedTuple):
    """State of `gap_aware`.

    Attributes:
      steps: number of gradients so far, int32.
      mean_square: mean square of the gradient, per parameter.
    """

    steps: jax.Array
    mean_square: Any


def gap_aware(
    learning_rate: float, decay: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Gap-Aware: divides a gradient by the distance its weights have moved since its forward.

    .. math::
        \frac{g}{1 + |w_\text{now} - w_\text{then}| / C}, \qquad
        C = \eta \left(\sqrt{r / (1 - \rho^t)} + \epsilon\right), \quad
        r \leftarrow \rho r + (1 - \rho) g^2

    elementwise: the gap in units of a typical step. The authors compute r from the momentum buffer;
    here it is computed from the gradient, so that it works before any optimizer.

    Args:
      learning_rate: :math:`\eta` > 0, the largest of the run.
      decay: :math:`\rho`, 0 <= decay < 1.
      eps: :math:`\epsilon` > 0.

    Returns:
      An optax transformation whose ``update`` needs the extra argument ``stale_params``.

    Raises:
      ValueError: a number out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> slow = gap_aware(learning_rate=1.0)
      >>> now, then = jnp.float32(3), jnp.float32(1)
      >>> round(float(slow.update(jnp.float32(2), slow.init(now), now, stale_params=then)[0]), 4)
      1.0

    References:
      Barkai, Hakimi, Schuster: `Gap-Aware Mitigation of Gradient Staleness
      <https://arxiv.org/abs/1909.10802>`_, 2020.
    """
    _check("learning_rate", learning_rate, learning_rate > 0, "more than 0")
    _check("decay", decay, 0 <= decay < 1, "in [0, 1)")
    _check("eps", eps, eps > 0, "more than 0")

    def init(params: Any) -> GapAwareState:
        return GapAwareState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: GapAwareState, params: Any = None, **extra: Any
    ) -> tuple[Any, GapAwareState]:
        then = _stale("gap_aware", params, extra)
        steps = state.steps + 1
        square = jax.tree.map(
            lambda r, g: decay * r + (1 - decay) * g * g, state.mean_square, updates
        )

        def slowed(g: jax.Array, r: jax.Array, now: jax.Array, old: jax.Array) -> jax.Array:
            unbiased = r / (1 - decay ** steps.astype(r.dtype))
            usual = learning_rate * (jnp.sqrt(unbiased) + eps)
            return g / (1 + jnp.abs(now - old) / usual)

        slower = jax.tree.map(slowed, updates, square, params, then)
        return slower, GapAwareState(steps, square)

    return optax.GradientTransformationExtraArgs(init, update)


def _stale(name: str, params: Any, extra: dict[str, Any]) -> Any:
    """The weights of a gradient's forward."""
    if params is None or "stale_params" not in extra:
        raise ValueError(
            f"{name}: needs params and stale_params, the weights at which the gradient was taken; "
            "fdg_jax.Pipeline gives them to an optimizer, and with accumulation to "
            "StageOptimizer(per_gradient=...)"
        )
    return extra["stale_params"]


def _check(name: str, value: float, fits: bool, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{name}={value}: must be {allowed}")
