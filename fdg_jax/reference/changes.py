"""Averages of weight changes, for rules with estimated weights."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.reconstruct import Reconstruct
from fdg_jax.schedule import Schedule
from fdg_jax.typing import PyTree


class Changes:
    """The average of every stage.

    Args:
      rule: the pipeline's gradient rule.
      schedule: determines the staleness of a stage; if that is 0, or if the rule does not estimate
        weights, the average stays zero.
      params: initial params, one pytree per stage.
    """

    def __init__(self, rule: GradientRule, schedule: Schedule, params: Sequence[PyTree]) -> None:
        self.average = [jax.tree.map(jnp.zeros_like, p) for p in params]
        self.gammas: dict[int, float] = {}
        if isinstance(rule, Reconstruct):
            late = {k: schedule.staleness(k) for k in range(schedule.num_stages)}
            self.gammas = {k: rule.decay ** (1 / tau) for k, tau in late.items() if tau}

    def add(self, k: int, old: PyTree, new: PyTree) -> None:
        """Adds an update of stage k."""
        if k in self.gammas:
            gamma = self.gammas[k]
            self.average[k] = jax.tree.map(
                lambda d, a, b: gamma * d + (1 - gamma) * (b - a), self.average[k], old, new
            )

    def ago(self, k: int, now: PyTree, updates: int) -> PyTree:
        """The estimate of the weights of the given number of updates ago."""
        return jax.tree.map(lambda w, d: w - updates * d, now, self.average[k])
