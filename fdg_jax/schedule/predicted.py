"""Schedules with predicted cotangents."""

from __future__ import annotations

from dataclasses import dataclass

from fdg_jax.schedule.action import LATE_KINDS, PREDICTED_KINDS, Action
from fdg_jax.schedule.schedule import Schedule


@dataclass(frozen=True)
class Predicted:
    """Tick t of DNI: stage k forwards and trains on batch t-k; targets are of batch t-k-2."""

    num_stages: int

    def __call__(self, t: int) -> list[Action]:
        last = self.num_stages - 1
        actions = [Action(kind, t - last, last) for kind in "FBU"]
        for k in reversed(range(last)):
            actions += [Action(kind, t - k, k) for kind in "FPU"]
            actions.append(Action("T", t - k - 2, k))
        return actions


@dataclass(frozen=True)
class Late:
    """Tick t of DNI with late targets: those of stage k are of batch t-2(K-1)+k, as in FDG."""

    num_stages: int
    predicted: int
    true: int

    def __call__(self, t: int) -> list[Action]:
        last = self.num_stages - 1
        actions = [Action(kind, t - last, last) for kind in "FBU"]
        for k in reversed(range(last)):
            new, old = t - k, t - 2 * last + k
            actions.append(Action("F", new, k))
            if self.predicts(new):
                actions += [Action("P", new, k), Action("U", new, k)]
            actions.append(Action("T", old, k))
            if self.predicts(old):
                actions.append(Action("D", old, k))
            else:
                actions += [Action("B", old, k), Action("U", old, k)]
        return actions

    def predicts(self, batch: int) -> bool:
        """Whether the stages use the predicted cotangent for a mini-batch."""
        return batch % (self.predicted + self.true) < self.predicted


def dni(num_stages: int) -> Schedule:
    """Decoupled neural interfaces: a stage trains immediately on a predicted cotangent.

    A synthesizer in every stage but the last predicts the cotangent of the stage's output. Its
    target is the cotangent computed by the next stage, itself from a prediction,

    .. math::
        \\hat\\delta_k = S_k(h_k), \\qquad
        \\min_{S_k} \\left\\lVert S_k(h_k) - \\hat\\delta_{k+1}
        \\, \\partial h_{k+1} / \\partial h_k \\right\\rVert^2

    with the true cotangent in the last stage. In a tick a stage forwards a batch, runs backward
    with the prediction (P), updates, and trains its synthesizer (T) on the next stage's message.

    Args:
      num_stages: K; its pipeline needs K-1 synthesizers.

    Returns:
      Delay 0 and staleness 0 in every stage.

    Raises:
      ValueError: K < 1.

    Example:
      >>> print(dni(2).grid(3))
      tick | stage 0      stage 1
         0 | F0 P0 U
         1 | F1 P1 U      F0 B0 U
         2 | F2 P2 U T0   F1 B1 U

    References:
      Jaderberg et al., `Decoupled Neural Interfaces using Synthetic Gradients
      <https://arxiv.org/abs/1608.05343>`_, section 2, 2017.
    """
    stages = tuple(range(num_stages - 1))
    return Schedule(
        "dni", num_stages, Predicted(num_stages), kinds=PREDICTED_KINDS, predicts=stages
    )


def dni_late(num_stages: int, predicted: int = 1, true: int = 0) -> Schedule:
    """DNI with the true cotangent as target, which FDG delivers 2(K-1-k) ticks later.

    The true cotangent is back-propagated as in `fdg`, at the weights of the batch's forward, and is
    the target of every synthesizer on its way. In predicted batches the stages train immediately
    with the synthesizers, and the true cotangent is only passed on (D); in true batches they train
    with it as in `fdg`, with its delay (B). Late targets are specific to this project and, to our
    knowledge, unpublished; the phases are those of ADA-GP.

    Args:
      num_stages: K; its pipeline needs K-1 synthesizers.
      predicted: the number of consecutive mini-batches trained with predictions.
      true: the number of subsequent mini-batches trained with the true cotangent.

    Returns:
      Delay 2(K-1-k) in stage k; staleness 0 of predicted batches, about 2(K-1-k) of true ones.

    Raises:
      ValueError: K < 1, or a number out of bounds.

    Example:
      >>> print(dni_late(2).grid(4))
      tick | stage 0         stage 1
         0 | F0 P0 U
         1 | F1 P1 U         F0 B0 U
         2 | F2 P2 U T0 D0   F1 B1 U
         3 | F3 P3 U T1 D1   F2 B2 U
      >>> print(dni_late(2, predicted=1, true=1).grid(4))
      tick | stage 0         stage 1
         0 | F0 P0 U
         1 | F1              F0 B0 U
         2 | F2 P2 U T0 D0   F1 B1 U
         3 | F3 T1 B1 U      F2 B2 U

    References:
      Janfaza et al., `ADA-GP: Accelerating DNN Training By Adaptive Gradient Prediction
      <https://arxiv.org/abs/2305.13236>`_, section 3, 2023, for the phases.
    """
    for name, value, least in (("predicted", predicted, 1), ("true", true, 0)):
        if value < least:
            raise ValueError(f"{name}={value}: must be {least} or more mini-batches")
    stages = tuple(range(num_stages - 1))
    rule = Late(num_stages, predicted, true)
    return Schedule(
        "dni_late",
        num_stages,
        rule,
        period=predicted + true,
        kinds=LATE_KINDS,
        predicts=stages,
    )
