"""Additional parts of methods: heads, losses in every stage, synthesizers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import optax

import fdg_jax as fdg
from experiments.common.errors import UsageError
from fdg_jax.layer import Layer
from fdg_jax.models.auxiliary import KINDS as HEADS
from fdg_jax.schedule import Schedule
from fdg_jax.typing import LossFn

HELP = {
    "auxiliary_head": f"With dgl: the head of every stage but the last, one of {', '.join(HEADS)}.",
    "synthesizer_learning_rate": "With dni and dni_late: Adam's rate in the synthesizers.",
    "synthesizer_width": "With dni and dni_late: channels of a synthesizer's hidden layers.",
    "phases": "With dni_late: mini-batches that learn from predicted and from true gradients, in "
    "turn, such as 4:1; 1:0 predicts always.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The settings of these methods; each field is the flag of that name."""

    auxiliary_head: str = "mlp-sr"
    synthesizer_learning_rate: float = 1e-4
    synthesizer_width: int = 128
    phases: str = "1:0"


class Settings(Protocol):
    """The settings used here, part of every program's settings."""

    @property
    def auxiliary_head(self) -> str: ...
    @property
    def synthesizer_learning_rate(self) -> float: ...
    @property
    def synthesizer_width(self) -> int: ...
    @property
    def phases(self) -> str: ...


def check(settings: Settings) -> None:
    """Raises `UsageError` for the first invalid value."""
    if settings.auxiliary_head not in HEADS:
        raise UsageError(
            f"--auxiliary_head={settings.auxiliary_head}: no such choice; allowed are "
            f"{', '.join(HEADS)}"
        )
    if settings.synthesizer_learning_rate <= 0:
        raise UsageError(
            f"--synthesizer_learning_rate={settings.synthesizer_learning_rate:g}: must be above 0; "
            "try 0.0001"
        )
    if not 1 <= settings.synthesizer_width < 2**16:
        raise UsageError(
            f"--synthesizer_width={settings.synthesizer_width}: must lie in 1..{2**16 - 1}; try 128"
        )
    phases(settings)


def phases(settings: Settings) -> tuple[int, int]:
    """Numbers of predicted and true mini-batches of a turn.

    Raises:
      UsageError: --phases is not a pair of numbers.
    """
    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", settings.phases)
    if found is None or int(found[1]) < 1:
        raise UsageError(
            f"--phases={settings.phases}: give predicted:true mini-batches, the first 1 or more, "
            "such as 4:1"
        )
    return int(found[1]), int(found[2])


@dataclasses.dataclass(frozen=True)
class Assembled:
    """The arguments of `fdg_jax.Pipeline` that a method extends.

    Attributes:
      stages: the stages, with heads if the schedule has losses in every stage.
      loss_fn: one function, or one per stage.
      synthesizer: a synthesizer if the schedule predicts, else None.
    """

    stages: Sequence[Layer]
    loss_fn: LossFn | Sequence[LossFn | None]
    synthesizers: fdg.Synthesizer | None


def assemble(
    settings: Settings,
    schedule: Schedule,
    stages: Sequence[Layer],
    loss_fn: LossFn,
    num_classes: int,
    *,
    images: bool,
) -> Assembled:
    """Creates the heads, losses and synthesizers of a method.

    Args:
      settings: the kinds of heads and synthesizers.
      schedule: the method's schedule.
      stages: the stages of the partition.
      loss_fn: the network's loss function.
      num_classes: size of the network's output, and number of labels.
      images: whether stages exchange images instead of vectors.

    Returns:
      The arguments.
    """
    losses: LossFn | list[LossFn | None] = loss_fn
    synthesizer = None
    if len(schedule.losses) > 1:
        head = fdg.models.auxiliary_head(num_classes, settings.auxiliary_head)
        stages = [*(fdg.with_head(stage, head) for stage in stages[:-1]), stages[-1]]
        losses = [loss_fn] * len(stages)
    if schedule.predicts:
        kind, width = "conv" if images else "mlp", settings.synthesizer_width
        layer = fdg.models.synthesizer(kind, labels=num_classes, width=width)
        rate = settings.synthesizer_learning_rate
        synthesizer = fdg.Synthesizer(layer, optax.adam(rate))
    return Assembled(stages, losses, synthesizer)


def lines_of(metrics: Sequence[fdg.Metrics], last: int) -> list[dict[str, Any]]:
    """The contents of log lines: the batches that reached the last stage.

    If stages have their own losses, the errors of earlier stages are of the same tick, and so of
    later batches.

    Args:
      metrics: the metrics of a step.
      last: number of the last stage.

    Returns:
      Batch, loss and error of each, and the errors of earlier stages, if any.
    """
    below = {m.stage: m.aux["error"] for m in metrics if m.stage < last}
    lines = []
    for m in metrics:
        if m.stage == last:
            line = {"batch": m.batch, "loss": m.loss, "error": m.aux["error"]}
            if below:
                line["stage_errors"] = [below.get(k, math.nan) for k in range(last)]
            lines.append(line)
    return lines


def stage_errors(
    values: Sequence[dict[str, Any]], mean: Callable[[list[float]], float]
) -> dict[str, list[float]]:
    """The mean errors of earlier stages, for a log line; empty if there are none.

    Args:
      values: results of `lines_of`, on the host.
      mean: computes the mean of several numbers.

    Returns:
      The field of the line.
    """
    rows = [line["stage_errors"] for line in values if "stage_errors" in line]
    if not rows:
        return {}
    return {"stage_errors": [mean(list(map(float, column))) for column in np.transpose(rows)]}
