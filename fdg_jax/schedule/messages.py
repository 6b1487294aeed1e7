"""The messages that an action sends and consumes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from fdg_jax.schedule.action import COTANGENT, OUTPUT, TIED, TIED_GRADIENT, Kind, Port


class Plan(Protocol):
    """The properties that messages depend on; see `fdg_jax.schedule.Schedule`."""

    @property
    def num_stages(self) -> int: ...
    @property
    def predicts(self) -> tuple[int, ...]: ...
    @property
    def tied(self) -> tuple[int, int] | None: ...


def given(schedule: Plan, kind: Kind, k: int) -> Iterator[tuple[str, int]]:
    """The messages that an action sends; see `fdg_jax.schedule.Schedule.gives`."""
    for name, hop in kind.gives:
        if 0 <= k + hop < schedule.num_stages and (name != OUTPUT or k in schedule.predicts):
            yield name, k + hop
    if schedule.tied is not None:
        owner, user = schedule.tied
        if k == owner and kind.in_flight == "opens":
            yield TIED, user
        if k == user and any(name == COTANGENT and hop for name, hop in kind.gives):
            yield TIED_GRADIENT, owner


def taken(schedule: Plan, kind: Kind, k: int) -> tuple[Port, ...]:
    """The messages that an action consumes; see `fdg_jax.schedule.Schedule.takes`."""
    if schedule.tied is None:
        return kind.takes
    owner, user = schedule.tied
    uses = k == user and kind.in_flight == "opens"
    learns = k == owner and Port(COTANGENT) in kind.takes
    return kind.takes + (Port(TIED),) * uses + (Port(TIED_GRADIENT),) * learns
