"""The gradient rule of PipeMare and LayerPipe2: estimates old weights from average changes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import optax

from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.optim import StageOptimizer, past_params, track_changes
from fdg_jax.typing import PyTree


@dataclass(frozen=True)
class Reconstruct(GradientRule):
    r"""Runs the backward at estimated weights; stores no versions.

    .. math::
        \hat w = w - n \, \delta, \qquad
        \delta \leftarrow \gamma \, \delta + (1 - \gamma) \, (w_\text{new} - w_\text{old})
        \text{ after each update}, \qquad \gamma = D^{1 / \tau}

    with n the updates between a batch's forward and its backward, and :math:`\tau` the largest n in
    steady state, `fdg_jax.schedule.Schedule.staleness`. During the fill, and with accumulated
    gradients, n is smaller for some batches. A batch in flight stores the stage's input; the
    average is part of the optimizer's state (`fdg_jax.track_changes`). With :math:`\tau = 0` a
    stage behaves as with "recompute".

    Args:
      decay: D, the weight in the average of changes older than the last :math:`\tau` updates,
        0 <= D < 1.
      staleness: :math:`\tau`; `of_stage` sets it.

    Raises:
      ValueError: decay is out of bounds.

    Example:
      >>> rule = Reconstruct(decay=0.25).of_stage(has_loss=False, staleness=2)
      >>> rule.gamma, rule.estimates_weights, rule.of_stage(True, 0).estimates_weights
      (0.5, True, False)

    References:
      Yang et al., `PipeMare <https://arxiv.org/abs/1910.05124>`_, 2019, technique 2;
      `LayerPipe2 <https://arxiv.org/abs/2512.08160>`_, 2025.
    """

    name: str = "reconstruct"
    keeps_residuals: bool = False
    keeps_weights: bool = False
    estimates_weights: bool = True
    decay: float = 0.135
    staleness: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: must lie in [0, 1); 0.135 is PipeMare's")

    @property
    def gamma(self) -> float:
        """The decay per update."""
        return self.decay ** (1 / self.staleness) if self.staleness else 0.0

    def of_stage(self, has_loss: bool, staleness: int = 0) -> GradientRule:
        del has_loss
        return dataclasses.replace(self, staleness=staleness, estimates_weights=staleness > 0)

    def optimizer(self, optimizer: StageOptimizer) -> StageOptimizer:
        if not self.estimates_weights:
            return optimizer
        return optimizer._replace(per_update=track_changes(optimizer.per_update, self.gamma))

    def past_params(
        self, params: PyTree, opt_state: optax.OptState, updates_ago: jax.Array
    ) -> PyTree:
        return past_params(params, opt_state, updates_ago)


RECONSTRUCT = Reconstruct()
