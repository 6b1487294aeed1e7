"""Error feedback: corrects every update by its difference to the previous one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.optim.staleness import Staleness, updates_late


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
      last: the previous update, uncorrected.
    """

    last: optax.Updates


def error_feedback(staleness: Staleness) -> optax.GradientTransformation:
    r"""Adds d times the current update and subtracts d times the previous one.

    .. math::
        x \leftarrow x + (1 + d) \, u_t - d \, u_{t-1}

    Place it at the *end* of a chain, after the learning rate. Up to rounding, its parameters x are
    the predicted weights p of ``predict_weights(optimizer, d, "last_update")`` if u does not depend
    on the parameters; decoupled weight decay does, and acts on p here and on w there. Here p is
    evaluated and saved; `true_params` has no effect. It helps in the same cases as prediction.
    Shrinking and clipping go before it. Memory: one copy of the parameters.

    Args:
      staleness: d, updates between forward and use of a gradient, >= 0, or ``(schedule, k)``.

    Returns:
      A transformation. With staleness 0 it leaves the updates unchanged.

    Raises:
      ValueError: the staleness is not a number >= 0.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(optax.sgd(0.1), error_feedback(staleness=1))
      >>> params, state = jnp.zeros(()), optimizer.init(jnp.zeros(()))
      >>> for gradient in (1.0, 0.0):
      ...     updates, state = optimizer.update(jnp.asarray(gradient), state)
      ...     print(round(float(updates), 6))
      -0.2
      0.1

    References:
      `arXiv 2606.30634 <https://arxiv.org/abs/2606.30634>`_, 2026, for d = 1; its extension to d
      and the equality are this project's.
    """
    late = updates_late(staleness)

    def init(params: optax.Params) -> ErrorFeedbackState:
        return ErrorFeedbackState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: ErrorFeedbackState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ErrorFeedbackState]:
        del params
        last = jax.tree.map(lambda u, old: u.astype(old.dtype), updates, state.last)
        if late:
            updates = jax.tree.map(
                lambda u, old: u + jnp.asarray(late, u.dtype) * (u - old.astype(u.dtype)),
                updates,
                state.last,
            )
        return updates, ErrorFeedbackState(last)

    return optax.GradientTransformation(init, update)
