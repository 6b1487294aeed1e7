"""Gradient rules: the weights of a backward, and what is stored for it.

    rule              kept for a batch in flight              weights of the backward
    stale             input, residuals, weights of forward    those of the forward
    recompute_stale   input, weights of forward               those of the forward
    recompute         input                                   the newest
    reversible        nothing for layers with an inverse      the newest
    reconstruct       input                                   an estimate of those of the forward

Without residuals, the backward recomputes the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import optax

from fdg_jax.engine.residuals import Stash
from fdg_jax.layer import Layer
from fdg_jax.optim import StageOptimizer
from fdg_jax.typing import Key, PyTree


class Stage(Protocol):
    """The interface of a stage to a rule; see `fdg_jax.engine.programs.Functions`."""

    layer: Layer
    sends: bool

    def pull_back(
        self, params: PyTree, stash: Stash, key: Key, message: PyTree
    ) -> tuple[PyTree, PyTree]: ...


@dataclass(frozen=True)
class GradientRule:
    """Selects the weights of a backward and what is stored for it.

    A custom rule is a frozen dataclass that extends this one and is passed to `fdg_jax.Pipeline`.
    Its methods are traced by JAX, except `of_stage`, `optimizer` and `backward_params`.

    Args:
      name: used in checkpoints and error messages.
      keeps_residuals: whether a forward stores its residuals; otherwise the backward recomputes the
        forward.
      keeps_weights: whether a backward uses the stored weights of the mini-batch's forward;
        otherwise the newest.
      reconstructs: whether layers with an inverse recompute their input from the output sent by the
        next stage; nothing is then stored for them.
      estimates_weights: whether a backward uses the estimate of `past_params`.

    Example:
      >>> RECOMPUTE.backward_params(then="old", now="new")
      'new'
    """

    name: str
    keeps_residuals: bool = True
    keeps_weights: bool = True
    reconstructs: bool = False
    estimates_weights: bool = False

    def of_stage(self, has_loss: bool, staleness: int = 0) -> GradientRule:
        """The rule of one stage.

        Args:
          has_loss: whether the stage has its own loss.
          staleness: the most updates between a batch's forward and its backward, in steady state.
        """
        del has_loss, staleness
        return self

    def optimizer(self, optimizer: StageOptimizer) -> StageOptimizer:
        """The optimizer of a stage, extended by the state that `past_params` reads.

        Args:
          optimizer: the given optimizer.
        """
        return optimizer

    def past_params(
        self, params: PyTree, opt_state: optax.OptState, updates_ago: jax.Array
    ) -> PyTree:
        """An estimate of earlier weights; called if the rule estimates weights.

        Args:
          params: the newest weights, as the optimizer sees them.
          opt_state: the state of the optimizer returned by `optimizer`.
          updates_ago: the number of updates between the forward and the backward, float32.
        """
        del opt_state, updates_ago
        return params

    def apply(
        self, layer: Layer, params: PyTree, state: PyTree, x: PyTree, key: Key
    ) -> tuple[PyTree, PyTree, PyTree]:
        """A forward in training.

        Args:
          layer: the stage.
          params, state: its params and model state.
          x: its input.
          key: the batch's key.

        Returns:
          The output, the new state, and the data stored instead of the input; None: the input.
        """
        return *layer.apply(params, state, x, train=True, key=key), None

    def backward(
        self, stage: Stage, params: PyTree, stash: Stash, key: Key, message: PyTree
    ) -> tuple[PyTree, PyTree]:
        """A backward.

        Args:
          stage: the stage.
          params: the result of `backward_params`.
          stash: the data stored by the forward.
          key: the root key.
          message: the message of the next stage, or the cotangent of the stage's own loss.

        Returns:
          The gradient of the parameters, and the message to the previous stage, None if it sends
          none.
        """
        return stage.pull_back(params, stash, key, message)

    def backward_params(self, then: PyTree, now: PyTree) -> PyTree:
        """The weights used by a backward.

        Args:
          then: the weights of the forward, stored or estimated; None if neither.
          now: the newest weights.
        """
        return then if self.keeps_weights or self.estimates_weights else now

    def message(self, inputs: PyTree, cotangent: PyTree) -> PyTree:
        """The message of a backward to the previous stage.

        Args:
          inputs: the inputs of this stage for the micro-batch.
          cotangent: the cotangent of those inputs.

        Returns:
          A pytree of arrays, sharded over their batch axis if they have one.
        """
        del inputs
        return cotangent

    def cotangent(self, message: PyTree) -> PyTree:
        """The cotangent of a stage's outputs from the next stage's message.

        Args:
          message: the result of the next stage's `message`.
        """
        return message


STALE = GradientRule("stale")
RECOMPUTE_STALE = GradientRule("recompute_stale", keeps_residuals=False)
RECOMPUTE = GradientRule("recompute", keeps_residuals=False, keeps_weights=False)
