"""Tied weights in a pipeline: the messages that carry them.

    forward of the owner    ──► tied n ──►            input of the user's forward
    backward of the owner   ◄── tied gradient n ◄──   message of the user's backward

Both are kept in the inbox of the receiving stage and are part of the state, as all messages are.
"""

from __future__ import annotations

from collections.abc import Sequence

from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import StageWork
from fdg_jax.layer import Layer
from fdg_jax.schedule import Kind, Schedule
from fdg_jax.schedule.action import ACTIVATION, TIED, TIED_GRADIENT
from fdg_jax.schedule.tied import tied as tied_schedule
from fdg_jax.tie import Paired, Tie
from fdg_jax.tied_stage import Tied, borrows, lent, tied_stages
from fdg_jax.typing import PyTree


def tie_stages(
    stages: Sequence[Layer], schedule: Schedule, rule: GradientRule, tie: Tie | None
) -> tuple[list[Layer], Schedule]:
    """The arguments of a pipeline, extended by tied weights.

    Args:
      stages, schedule, rule: the arguments as given.
      tie: the tied weights, or None.

    Returns:
      Stages and schedule; the weights are sent if the two layers are in different stages.

    Raises:
      ValueError: the weights cannot be tied, in general or with this schedule or rule.
    """
    stages = tied_stages(stages, tie)
    ties = [(k, stage) for k, stage in enumerate(stages) if isinstance(stage, Tied)]
    if ties and rule.reconstructs:
        raise ValueError(
            f"tie: gradient={rule.name!r} takes stages apart, which tied ones cannot be; take "
            '"stale", "recompute_stale" or "recompute"'
        )
    if len(ties) > 1:
        (owner, _), (user, _) = ties
        schedule = tied_schedule(schedule, owner, user)
    return stages, schedule


def inputs_of(stage: Stage, own: StageWork, n: int) -> PyTree:
    """The inputs of the forward of micro-batch n."""
    x = own.take(ACTIVATION, n)
    return Paired(x, own.take(TIED, n)) if borrows(stage.layer) else x


def message_of(schedule: Schedule, kind: Kind, k: int, own: StageWork, n: int) -> PyTree:
    """The message for the backward of micro-batch n."""
    first, *more = (own.take(port.name, n) for port in schedule.takes(kind, k))
    return Paired(first, more[0]) if more and schedule.tied is not None else first


def output_of(stage: Stage, params: PyTree, y: PyTree) -> PyTree:
    """The output that a forward sends."""
    tied = lent(stage.layer, params)
    return y if tied is None else Paired(y, tied)


def part(name: str, value: PyTree) -> PyTree:
    """The part of a result that is sent by one port."""
    if not isinstance(value, Paired):
        return value
    return value.tied if name in (TIED, TIED_GRADIENT) else value.value
