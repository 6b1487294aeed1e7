"""Learning rates for stages with stale gradients."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from fdg_jax.optim.staleness import Staleness, checked_number, updates_late


def staleness_rate(
    learning_rate: optax.ScalarOrSchedule,
    staleness: Staleness,
    anneal_steps: float,
    power: float = 1.0,
) -> optax.ScalarOrSchedule:
    r"""A learning rate that starts divided by the staleness and grows to its full value.

    .. math::
        \eta_k(t) = \eta(t) \, / \, \max(d, 1)^{\, q \, (1 - \min(t / T, 1))}

    The first updates are the largest and suffer most from stale gradients. It replaces the stage's
    learning rate and combines with all other remedies; clipping per stage has a similar effect on
    the first updates. Memory: none.

    Args:
      learning_rate: a number, or a schedule of the stage's updates.
      staleness: d, updates between forward and use of a gradient, >= 0, or ``(schedule, k)``.
      anneal_steps: T > 0, the stage's updates until the full rate.
      power: q >= 0, the exponent of the staleness at the first update.

    Returns:
      A schedule of the stage's updates; ``learning_rate`` itself if d <= 1.

    Raises:
      ValueError: a number out of bounds.

    Example:
      >>> rate = staleness_rate(0.1, staleness=4, anneal_steps=100)
      >>> [round(float(rate(step)), 3) for step in (0, 50, 100)]
      [0.025, 0.05, 0.1]

    References:
      Yang et al., `PipeMare <https://arxiv.org/abs/1910.05124>`_, 2019, technique 1.
    """
    late = updates_late(staleness)
    tiny = math.ulp(0.0)
    steps = checked_number("anneal_steps", anneal_steps, tiny, math.inf, "half of a run is a start")
    q = checked_number("power", power, 0, math.inf, "1 divides by the whole staleness")
    if late <= 1 or not q:
        return learning_rate

    def rate(count: jax.Array | int) -> jax.Array:
        found = learning_rate(count) if callable(learning_rate) else learning_rate
        return jnp.asarray(found * late ** (q * (jnp.minimum(count / steps, 1.0) - 1)))

    return rate
