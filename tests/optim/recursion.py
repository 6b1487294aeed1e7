"""Delayed gradients on a small problem, and runs of a transformation on it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 30


def gradient(x: np.ndarray, step: int) -> np.ndarray:
    """The gradient of a non-quadratic loss that differs from step to step."""
    return np.sin(x) + 0.3 * x + 0.1 * np.cos(step + np.arange(x.size)).reshape(x.shape)


def start(shape: tuple[int, ...] = (5,)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def run(optimizer: optax.GradientTransformation, delay: int, shape=(5,), steps: int = STEPS):
    """The parameters after every update with a gradient that is ``delay`` updates old, and the last
    state."""
    params = [jnp.asarray(start(shape))]
    state = optimizer.init(params[0])
    update = jax.jit(optimizer.update)
    for step in range(steps):
        old = np.asarray(params[max(0, step - delay)])
        updates, state = update(jnp.asarray(gradient(old, step)), state, params[-1])
        params.append(optax.apply_updates(params[-1], updates))
    return np.stack(params), state


def two_variables(
    advance: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    ahead: Callable[[np.ndarray, int], np.ndarray],
    delay: int,
    shape=(5,),
    steps: int = STEPS,
):
    """The papers' form: w is updated, and forwards run at ``ahead(w, step)``.

    Args:
      advance: (w, gradient, step) -> the next w; keeps its own state.
      ahead: (w, number of updates) -> the prediction.
    """
    w = start(shape)
    predicted, weights = [w], [w]
    for step in range(steps):
        w = advance(w, gradient(predicted[max(0, step - delay)], step), step)
        predicted.append(ahead(w, step + 1))
        weights.append(w)
    return np.stack(predicted), np.stack(weights)


def rate(count):
    """A learning rate that differs at every update."""
    return 0.02 / (1 + 0.1 * count)


def trained(optimizer: optax.GradientTransformation, steps: int = 8):
    """The parameters, one kernel and one bias, after some updates in one program."""
    params = {"kernel": jnp.sin(jnp.arange(12.0)).reshape(3, 4), "bias": jnp.ones(4)}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, t):
        gradient = jax.tree.map(lambda p: jnp.cos(3 * p + t), params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(steps):
        params, state = step(params, state, t)
    return params
