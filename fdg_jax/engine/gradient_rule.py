"""Which weights a backward uses, and what is kept between a forward and its backward.

    rule              kept for a batch in flight              weights of the backward
    stale             input, residuals, weights of forward    those of the forward
    recompute_stale   input, weights of forward               those of the forward
    recompute         input                                   the newest
    reversible        nothing, of layers with an inverse      the newest

Where residuals are not kept, the backward runs the forward again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fdg_jax.engine.residuals import Stash
from fdg_jax.layer import Layer
from fdg_jax.typing import Key, PyTree


class Stage(Protocol):
    """What a rule asks of a stage; see `fdg_jax.engine.programs.Functions`."""

    layer: Layer
    sends: bool

    def pull_back(
        self, params: PyTree, stash: Stash, key: Key, message: PyTree
    ) -> tuple[PyTree, PyTree]: ...


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
      reconstructs: whether a layer with an inverse computes its input again from its output, which
        the stage after it sends; then nothing of it is kept.

    Example:
      >>> RECOMPUTE.backward_params(then="old", now="new")
      'new'
    """

    name: str
    keeps_residuals: bool = True
    keeps_weights: bool = True
    reconstructs: bool = False

    def of_stage(self, has_loss: bool) -> GradientRule:
        """The rule of one stage.

        Args:
          has_loss: whether the stage has a loss of its own.
        """
        del has_loss
        return self

    def apply(
        self, layer: Layer, params: PyTree, state: PyTree, x: PyTree, key: Key
    ) -> tuple[PyTree, PyTree, PyTree]:
        """A forward in training.

        Args:
          layer: the stage.
          params, state: its own.
          x: its input.
          key: of the batch.

        Returns:
          The output, the new state, and what is kept in the place of the input; None: the input.
        """
        return *layer.apply(params, state, x, train=True, key=key), None

    def backward(
        self, stage: Stage, params: PyTree, stash: Stash, key: Key, message: PyTree
    ) -> tuple[PyTree, PyTree]:
        """A backward.

        Args:
          stage: whose.
          params: `backward_params`.
          stash: what the forward left.
          key: the root key.
          message: of the next stage, or the cotangent of the stage's own loss.

        Returns:
          The gradient of the parameters, and the message to the stage before; None where the stage
          sends none.
        """
        return stage.pull_back(params, stash, key, message)

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
