"""Which weights a backward uses, and what is kept between a forward and its backward.

    rule              kept for a batch in flight              weights of the backward
    stale             input, residuals, weights of forward    those of the forward
    recompute_stale   input, weights of forward               those of the forward
    recompute         input                                   the newest

Where residuals are not kept, the backward runs the forward again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PyTree = Any


@dataclass(frozen=True)
class GradientRule:
    """Which weights a backward uses, and what is kept for it.

    A rule of one's own is a frozen dataclass that extends this one; it is an argument of
    `fdg_jax.Pipeline` like the three names above. Its methods are traced by JAX.

    Args:
      name: stands in checkpoints and in error messages.
      keeps_residuals: whether a forward leaves its residuals; if not, the backward runs the forward
        again.
      keeps_weights: whether a backward uses the weights of the batch's forward, which are then
        kept; if not, the newest.

    Example:
      >>> gradient_rule("recompute").backward_params(then="old", now="new")
      'new'
    """

    name: str
    keeps_residuals: bool = True
    keeps_weights: bool = True

    def backward_params(self, then: PyTree, now: PyTree) -> PyTree:
        """The weights that a backward uses.

        Args:
          then: of the batch's forward; None where they are not kept.
          now: the newest.
        """
        return then if self.keeps_weights else now

    def message(self, inputs: PyTree, cotangent: PyTree) -> PyTree:
        """What a backward sends to the stage before.

        Args:
          inputs: of this stage, for the micro-batch.
          cotangent: of those inputs.

        Returns:
          A pytree of arrays; those with a batch axis are sharded over it.
        """
        del inputs
        return cotangent

    def cotangent(self, message: PyTree) -> PyTree:
        """The cotangent of a stage's outputs in what the next stage sent.

        Args:
          message: of the next stage's `message`.
        """
        return message


STALE = GradientRule("stale")
RECOMPUTE_STALE = GradientRule("recompute_stale", keeps_residuals=False)
RECOMPUTE = GradientRule("recompute", keeps_residuals=False, keeps_weights=False)
RULES = {rule.name: rule for rule in (STALE, RECOMPUTE_STALE, RECOMPUTE)}


def gradient_rule(gradient: str | GradientRule) -> GradientRule:
    """The rule that an argument ``gradient=`` names, or is.

    Args:
      gradient: a key of `RULES`, or a rule.

    Returns:
      The rule.

    Raises:
      ValueError: no such rule.
    """
    if isinstance(gradient, GradientRule):
        return gradient
    if gradient not in RULES:
        raise ValueError(
            f"gradient={gradient!r}: allowed are {', '.join(RULES)}, or a GradientRule"
        )
    return RULES[gradient]
