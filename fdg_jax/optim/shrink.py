"""Gradient shrinking as an optax transformation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class ShrinkState(NamedTuple):
    """Number of updates so far; stored only if beta is a schedule."""

    count: jax.Array  # type: ignore[assignment]  # optax's name for it


def fdg_shrink(
    beta: float | jax.Array | optax.Schedule, hops: int | jax.Array
) -> optax.GradientTransformation:
    r"""Multiplies a stage's gradient by beta ** hops, for its hops to the loss.

    .. math::
        u_k \leftarrow \beta^{h_k} \, u_k, \qquad h_k = K - 1 - k

    The paper multiplies the error gradient by :math:`\beta` at each stage boundary on its way from
    the loss (stage K-1) to stage k. Back-propagation through a stage is linear in the error
    gradient, so stage k's parameter gradient is multiplied by :math:`\beta^{K-1-k}`; applying this
    factor once, here, is equivalent.

    In a chain it belongs *first*, before weight decay and momentum: only the gradient is stale, so
    only the gradient is shrunk. An optimizer that divides by the gradient's own scale (Adam,
    RMSProp, LAMB) cancels a constant factor: there it has no effect unless it comes last, where it
    shrinks the learning rate instead.

    Args:
      beta: shrinking factor in (0, 1], or an optax schedule that maps the stage's own update count
        to one. Dimensionless. beta = 1 leaves the gradient unchanged.
      hops: boundaries between the stage and the loss, K-1-k. An int >= 0.

    Returns:
      An ``optax.GradientTransformation``. Updates keep their dtypes.

    Raises:
      ValueError: beta is a number outside (0, 1], or hops a negative number.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(fdg_shrink(0.5, hops=2), optax.sgd(0.1, momentum=0.9))
      >>> params = jnp.ones(3)
      >>> updates, _ = optimizer.update(jnp.ones(3), optimizer.init(params), params)
      >>> print(updates)
      [-0.025 -0.025 -0.025]

    References:
      Zhuang et al., `Fully Decoupled Neural Network Learning Using Delayed Gradients
      <https://arxiv.org/abs/1906.09108>`_, gradient shrinking process, 2022.
    """
    # Under optax.inject_hyperparams both are arrays, traced inside jit.
    known = not (callable(beta) or isinstance(beta, jax.core.Tracer))
    if known and not (_is_number(beta) and 0 < float(beta) <= 1):
        raise ValueError(f"beta={beta}: shrinking needs a number 0 < beta <= 1 (1: none)")
    known = not isinstance(hops, jax.core.Tracer)
    if known and not (_is_number(hops) and float(hops) >= 0 and float(hops) % 1 == 0):
        raise ValueError(f"hops={hops}: stage k of K is K-1-k hops from the loss, an int >= 0")

    def shrink(updates: optax.Updates, factor: float | jax.Array) -> optax.Updates:
        return jax.tree.map(lambda u: jnp.asarray(factor, dtype=u.dtype) * u, updates)

    if callable(beta):

        def init_count(params: optax.Params) -> ShrinkState:
            del params
            return ShrinkState(jnp.zeros((), jnp.int32))

        def update_scheduled(
            updates: optax.Updates, state: ShrinkState, params: optax.Params | None = None
        ) -> tuple[optax.Updates, ShrinkState]:
            del params
            factor = jnp.asarray(beta(state.count)) ** hops
            return shrink(updates, factor), ShrinkState(optax.safe_increment(state.count))

        return optax.GradientTransformation(init_count, update_scheduled)

    def init_empty(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_constant(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        return shrink(updates, beta**hops), state

    return optax.GradientTransformation(init_empty, update_constant)


def _is_number(value: object) -> bool:
    return np.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.number)  # type: ignore[arg-type]
