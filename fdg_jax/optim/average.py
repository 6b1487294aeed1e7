"""An exponential moving average of the weights in the optimizer state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.optim.displacement import states_of
from fdg_jax.optim.prediction import true_params
from fdg_jax.optim.staleness import checked_number
from fdg_jax.optim.transformation import transformation


class AverageState(NamedTuple):
    """State of `average_weights`.

    Attributes:
      inner: state of the wrapped optimizer.
      average: average of the weights, like params.
    """

    inner: optax.OptState
    average: optax.Params


def average_weights(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps an exponential moving average of the weights; does not change the updates.

    .. math::
        \bar{w}_0 = w_0, \qquad \bar{w}_{t+1} = d \, \bar{w}_t + (1 - d) \, w_{t+1}

    The average starts at the initial weights and uses the memory of one copy of the weights. It is
    part of the optimizer state: each stage keeps its part on its own devices, and checkpoints
    include it. With weight prediction (`fdg_jax.predict_weights`, `fdg_jax.delayed_sgd`), inside or
    outside, the average is of the true weights. It counts the stage's updates.

    Args:
      optimizer: the wrapped optimizer.
      decay: d, in [0, 1), for example 0.999.

    Returns:
      A transformation; `averaged_params` reads the average.

    Raises:
      ValueError: decay is out of range, or ``update`` is called without params.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = average_weights(optax.sgd(1.0), decay=0.75)
      >>> params = jnp.zeros(())
      >>> updates, state = optimizer.update(jnp.ones(()), optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(float(params), float(averaged_params(params, state)))
      -1.0 -0.25

    References:
      Polyak, Juditsky: Acceleration of Stochastic Approximation by Averaging, 1992.
    """
    decay = checked_number("decay", decay, 0, 1, "0.999 averages over about 1,000 updates")
    inner = transformation(optimizer)

    def init(params: optax.Params) -> AverageState:
        return AverageState(inner.init(params), jax.tree.map(jnp.copy, params))

    def update(
        updates: optax.Updates,
        state: AverageState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageState]:
        if params is None:
            raise ValueError("params: an average of weights needs update(grads, state, params)")
        updates, new = inner.update(updates, state.inner, params, **extra_args)
        weights = true_params(optax.apply_updates(params, updates), new)
        average = jax.tree.map(
            lambda a, w: (decay * a + (1 - decay) * w).astype(a.dtype), state.average, weights
        )
        return updates, AverageState(new, average)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(params: optax.Params, opt_state: optax.OptState) -> optax.Params:
    """The average of the weights kept by `average_weights`.

    Args:
      params: parameters trained with this optimizer.
      opt_state: the optimizer's state, with `average_weights` anywhere in it.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: the state contains no average, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = average_weights(optax.sgd(0.1), 0.9)
      >>> float(averaged_params(jnp.ones(()), optimizer.init(jnp.ones(()))))
      1.0
    """
    found = states_of(opt_state, AverageState)
    if len(found) != 1:
        raise ValueError(
            f"opt_state: has {len(found)} averages of weights; wrap the whole optimizer of the "
            "stage in fdg_jax.average_weights once"
        )
    del params
    return found[0].average


def restarted_average(params: optax.Params, opt_state: optax.OptState) -> optax.OptState:
    """Restarts the average of an optimizer state, if it has one, at given weights.

    Args:
      params: true weights.
      opt_state: the state of an optimizer of such params.

    Returns:
      The state, otherwise unchanged.
    """

    def one(node: Any) -> Any:
        if isinstance(node, AverageState):
            return node._replace(average=jax.tree.map(jnp.copy, params))
        return node

    return jax.tree.map(one, opt_state, is_leaf=lambda node: isinstance(node, AverageState))
