"""Groups the actions of a stage that run as one program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fdg_jax.schedule import Action, Kind, Schedule
from fdg_jax.schedule.action import COTANGENT, OUTPUT


def fuse(actions: Sequence[Action], schedule: Schedule) -> Iterator[tuple[Action, ...]]:
    """Groups actions into programs: B, U; in a stage with a loss F, B, U of one mini-batch."""
    kinds = schedule.kind_of
    i = 0
    while i < len(actions):
        a, *after = actions[i : i + 3]
        b, c = (*after, None, None)[:2]
        size = 1
        if _learns(a, b, kinds):
            size = 2
        elif (
            a.version is None
            and kinds[a.kind].in_flight == "opens"
            and a.stage in schedule.losses
            and b is not None
            and (b.stage, b.batch, b.micro) == (a.stage, a.batch, a.micro)
            and _learns(b, c, kinds)
        ):
            size = 3
        yield tuple(actions[i : i + size])
        i += size


def _learns(a: Action, b: Action | None, kinds: dict[str, Kind]) -> bool:
    """Whether two actions are a whole backward and the update with its gradient."""
    if b is None or (b.stage, b.batch) != (a.stage, a.batch):
        return False
    one = kinds[a.kind]
    whole = one.gradient == "adds" and one.takes[0].name in (COTANGENT, OUTPUT)
    return whole and kinds[b.kind].gradient == "applies"


def name_of(actions: Sequence[Action]) -> str:
    """A program's actions and stage: F3 B3 U@1."""
    return f"{' '.join(action.label for action in actions)}@{actions[0].stage}"
