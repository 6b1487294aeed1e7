"""The gradient rules by name."""

from __future__ import annotations

from fdg_jax.engine.gradient_rule import RECOMPUTE, RECOMPUTE_STALE, STALE, GradientRule
from fdg_jax.engine.reversible import REVERSIBLE

RULES = {rule.name: rule for rule in (STALE, RECOMPUTE_STALE, RECOMPUTE, REVERSIBLE)}


def gradient_rule(gradient: str | GradientRule) -> GradientRule:
    """The rule that an argument ``gradient=`` names, or is.

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
