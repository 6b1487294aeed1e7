"""Estimates earlier weights from an average of weight changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.optim.displacement import states_of
from fdg_jax.optim.staleness import checked_number
from fdg_jax.optim.transformation import transformation


class ChangesState(NamedTuple):
    """State of `track_changes`.

    Attributes:
      inner: state of the optimizer.
      average: average change of the weights per update.
    """

    inner: optax.OptState
    average: optax.Updates


def track_changes(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer to keep an average of its updates, which it leaves unchanged.

    .. math::
        \delta \leftarrow \gamma \, \delta + (1 - \gamma) \, (w_\text{new} - w_\text{old})

    It must wrap the *whole* optimizer, since transformations chained after it change the weights,
    too. The average starts at zero; `past_params` reads it. Memory: one copy of the parameters.

    Args:
      optimizer: any optax transformation whose result is added to the parameters.
      decay: :math:`\gamma`, 0 <= decay < 1. ``0.135 ** (1 / n)`` suits weights of n updates ago:
        changes older than n updates then have the weight 0.135 in the average.

    Returns:
      A transformation; its state is a `ChangesState`.

    Raises:
      ValueError: decay is out of bounds.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = track_changes(optax.sgd(0.1), decay=0.5)
      >>> params = jnp.ones(())
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(jnp.ones(()), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(round(float(params), 6), round(float(state.average), 6))
      0.8 -0.075

    References:
      Yang et al., `PipeMare <https://arxiv.org/abs/1910.05124>`_, 2019, technique 2.
    """
    gamma = checked_number("decay", decay, 0, 1, "0.135 ** (1 / n) suits weights of n updates ago")
    inner = transformation(optimizer)

    def init(params: optax.Params) -> ChangesState:
        return ChangesState(inner.init(params), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates,
        state: ChangesState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ChangesState]:
        updates, new = inner.update(updates, state.inner, params, **extra_args)

        def mean(old: jax.Array, change: jax.Array) -> jax.Array:
            part = jnp.asarray(gamma, old.dtype)
            return part * old + (1 - part) * change.astype(old.dtype)

        return updates, ChangesState(new, jax.tree.map(mean, state.average, updates))

    return optax.GradientTransformationExtraArgs(init, update)


def past_params(
    params: optax.Params, opt_state: optax.OptState, updates_ago: jax.Array | float
) -> optax.Params:
    r"""Estimates the weights of n updates ago: :math:`\hat w = w - n \, \delta`.

    Exact if all updates are equal, after the average has converged.

    Args:
      params: the newest weights.
      opt_state: the state of their optimizer, with `track_changes` anywhere in it; it may be that
        of a `StageOptimizer`.
      updates_ago: n >= 0, a scalar; 0 gives the newest.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: the optimizer does not track its changes.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = track_changes(optax.sgd(0.1), decay=0)
      >>> params = jnp.ones(())
      >>> updates, state = optimizer.update(jnp.ones(()), optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(round(float(params), 6), round(float(past_params(params, state, 1)), 6))
      0.9 1.0

    References:
      Yang et al., `PipeMare <https://arxiv.org/abs/1910.05124>`_, 2019, technique 2;
      `LayerPipe2 <https://arxiv.org/abs/2512.08160>`_, 2025.
    """
    found = states_of(opt_state, ChangesState)
    if not found:
        raise ValueError(
            "opt_state: has no average of the changes; wrap the optimizer in track_changes"
        )

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def before(average: Any, p: Any) -> Any:
        return p if masked(average) else p - jnp.asarray(updates_ago, p.dtype) * average

    for state in found:
        params = jax.tree.map(before, state.average, params, is_leaf=masked)
    return params
