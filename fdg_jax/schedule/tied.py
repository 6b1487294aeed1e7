"""Schedules that also send a tied array between two stages."""

from __future__ import annotations

import dataclasses

from fdg_jax.schedule.action import COTANGENT
from fdg_jax.schedule.schedule import Schedule
from fdg_jax.schedule.sequence import Then, then


def tied(schedule: Schedule, owner: int, user: int) -> Schedule:
    """The same actions with two more messages per micro-batch, for `fdg_jax.tie`.

    A forward of the owner's stage sends the array to the user's stage, whose forward takes it; the
    user's backward sends its gradient to the owner's stage, whose backward takes it. Both messages
    arrive in time, since the owner forwards before the user and back-propagates after it.

    Args:
      schedule: the actions.
      owner: the stage that owns the array.
      user: the later stage that uses it.

    Returns:
      A schedule that is otherwise the same.

    Raises:
      ValueError: the schedule sends no cotangents of the loss from the user to the owner.

    Example:
      >>> from fdg_jax import schedule
      >>> plan = tied(schedule.fdg(3), owner=0, user=2)
      >>> sorted(plan.holdings(9)[0].inbox["tied_gradient"])
      [5, 6]
    """
    sends = any(name == COTANGENT and hop for kind in schedule.kinds for name, hop in kind.gives)
    if schedule.predicts or len(schedule.losses) > 1 or not sends:
        raise ValueError(
            f"tie: schedule {schedule.name} sends no gradient of the loss from stage {user} to "
            f"stage {owner}; take one that does, such as fdg"
        )
    if isinstance(schedule, Then):
        first, steps, second = schedule.phases.first, schedule.phases.steps, schedule.phases.second
        return then(tied(first, owner, user), steps, tied(second, owner, user))
    return dataclasses.replace(schedule, tied=(owner, user))
