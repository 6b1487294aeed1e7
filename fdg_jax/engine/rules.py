"""Gradient rules by name."""

from __future__ import annotations

from fdg_jax.engine.gradient_rule import RECOMPUTE, RECOMPUTE_STALE, STALE, GradientRule
from fdg_jax.engine.reconstruct import RECONSTRUCT
from fdg_jax.engine.reversible import REVERSIBLE
from fdg_jax.schedule import Schedule

RULES = {rule.name: rule for rule in (STALE, RECOMPUTE_STALE, RECOMPUTE, REVERSIBLE, RECONSTRUCT)}


def gradient_rule(gradient: str | GradientRule) -> GradientRule:
    """Resolves the argument ``gradient=``.

    Args:
      gradient: a key of `RULES`, or a rule.

    Returns:
      The rule.

    Raises:
      ValueError: no such rule.

    Example:
      >>> gradient_rule("recompute").backward_params(then="old", now="new")
      'new'
    """
    if isinstance(gradient, GradientRule):
        return gradient
    if gradient not in RULES:
        raise ValueError(
            f"gradient={gradient!r}: allowed are {', '.join(RULES)}, or a GradientRule"
        )
    return RULES[gradient]


def stage_rule(gradient: str | GradientRule, schedule: Schedule, k: int) -> GradientRule:
    """The rule of one stage of a pipeline.

    Args:
      gradient: as for `gradient_rule`.
      schedule: the pipeline's schedule.
      k: the stage.

    Returns:
      The rule.

    Raises:
      ValueError: no such rule; there is no stage k.

    Example:
      >>> from fdg_jax import schedule
      >>> [stage_rule("reconstruct", schedule.fdg(3), k).estimates_weights for k in range(3)]
      [True, True, False]
    """
    return gradient_rule(gradient).of_stage(k in schedule.losses, schedule.staleness(k))
