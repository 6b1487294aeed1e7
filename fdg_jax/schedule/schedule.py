"""Actions, and schedules as streams of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fdg_jax.schedule.action import Action, needs

Rule = Callable[[int], Sequence[Action]]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Schedule:
    """A rule from ticks to actions, and what follows from it.

    Args:
      name: as the field calls it.
      num_stages: K.
      rule: the actions of a tick in an order in which they can be dispatched. It may name batches
        that do not exist (numbers below 0 during the fill, beyond the last during the drain): those
        actions fall away.
      microbatches: into how many parts a mini-batch is divided.
      reduction: what an update applies of the gradients since the last: "mean" or "sum".
      versions: how many versions of its weights a stage keeps for forwards that name theirs.
      period: after how many ticks the rule repeats itself.
    """

    name: str
    num_stages: int
    rule: Rule
    microbatches: int = 1
    reduction: Reduction = "mean"
    versions: int = 1
    period: int = 1

    def __post_init__(self) -> None:
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages}: a network has at least one stage")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f'reduction={self.reduction!r}: allowed are "mean" and "sum"')

    def tick(self, t: int, end: int | None = None) -> list[Action]:
        """The actions of one tick.

        Args:
          t: number of the tick; 0 is the first of the fill.
          end: batches 0..end-1 exist; None: there is no last one.

        Returns:
          Actions in an order in which they can be dispatched.

        Example:
          >>> from fdg_jax import schedule
          >>> [str(action) for action in schedule.fdg(2).tick(2)]
          ['F1@1', 'B1@1', 'U@1', 'F2@0', 'B0@0', 'U@0']
        """
        return [a for a in self.rule(t) if a.batch >= 0 and (end is None or a.batch < end)]

    def stream(self, batches: int) -> Iterator[list[Action]]:
        """A whole run, tick by tick, from the fill to the drain.

        Args:
          batches: how many enter.

        Yields:
          The actions of each tick. A last, partial accumulation is applied at the very end.

        Raises:
          ValueError: the rule is no pipeline: something is done twice, before what it needs, by a
            stage that does not exist, or never.
        """
        done: set[Action] = set()
        waiting = dict.fromkeys(range(self.num_stages), -1)
        t = idle = backwards = 0
        total = batches * self.num_stages * self.microbatches
        while backwards < total:
            actions = self.tick(t, batches)
            idle += 1
            for action in actions:
                if action.kind == "U" and waiting.get(action.stage, -1) < 0:
                    raise ValueError(f"schedule {self.name}: {action} in tick {t} applies nothing")
                if action.kind != "U":
                    self._check(action, done)
                    done.add(replace(action, version=None))
                    idle = 0
                    backwards += action.kind == "B"
                if action.kind != "F":
                    waiting[action.stage] = action.batch if action.kind == "B" else -1
            if idle > 8 * self.num_stages + self.period:
                raise ValueError(f"schedule {self.name}: after tick {t} batches are left in flight")
            t += 1
            if backwards == total:
                actions = actions + [Action("U", n, k) for k, n in waiting.items() if n >= 0]
            yield actions

    def _check(self, action: Action, done: set[Action]) -> None:
        k = action.stage
        action = replace(action, version=None)
        if not 0 <= k < self.num_stages:
            raise ValueError(
                f"schedule {self.name}: {action}, but there are {self.num_stages} stages"
            )
        if action in done:
            raise ValueError(f"schedule {self.name}: {action} comes twice")
        for need in needs(action, self.num_stages):
            if need not in done:
                raise ValueError(f"schedule {self.name}: {action} comes before {need}")

    def delay(self, k: int) -> int:
        """Ticks between the forward and the backward of one mini-batch.

        Args:
          k: the stage, 0..K-1.

        Returns:
          Ticks in steady state.

        Raises:
          ValueError: there is no stage k.
        """
        return self._of(k).delay

    def staleness(self, k: int) -> int:
        """Updates of a stage between a batch's forward and the moment its gradient is applied.

        Args:
          k: the stage, 0..K-1.

        Returns:
          The largest in steady state; see `mean_staleness`.

        Raises:
          ValueError: there is no stage k.
        """
        return self._of(k).staleness

    def mean_staleness(self, k: int) -> float:
        """The mean of what `staleness` is the largest of.

        Args:
          k: the stage, 0..K-1.

        Returns:
          Updates.

        Raises:
          ValueError: there is no stage k.
        """
        return self._of(k).mean_staleness

    def in_flight(self, k: int) -> int:
        """The most mini-batches that a stage has forwarded and whose gradient it has not applied.

        Args:
          k: the stage, 0..K-1.

        Returns:
          Mini-batches; one of which only parts are in flight counts as one.

        Raises:
          ValueError: there is no stage k.
        """
        return self._of(k).in_flight

    def _of(self, k: int) -> _Counts:
        if not 0 <= k < self.num_stages:
            raise ValueError(f"k={k}: schedule {self.name} has stages 0 to {self.num_stages - 1}")
        return self._counted[k]

    @functools.cached_property
    def _counted(self) -> list[_Counts]:
        # Long enough that the middle third is steady state, and several periods of it.
        return count(self, 6 * self.num_stages + 6 * self.period)

    def grid(self, ticks: int) -> str:
        """A schedule as text: ticks down, stages across.

        Args:
          ticks: how many, from the start of the fill.

        Returns:
          Lines, the first with the heads.
        """
        cells = []
        for t in range(ticks):
            actions = self.tick(t)
            cells.append(
                [" ".join(a.label for a in actions if a.stage == k) for k in range(self.num_stages)]
            )
        heads = [f"stage {k}" for k in range(self.num_stages)]
        widths = [
            max(len(text) for text in (head, *(row[k] for row in cells))) + 3
            for k, head in enumerate(heads)
        ]
        lines = ["tick | " + "".join(h.ljust(w) for h, w in zip(heads, widths, strict=True))]
        for t, row in enumerate(cells):
            lines.append(
                f"{t:4} | " + "".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
            )
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.grid(2 * self.num_stages)


@dataclass(frozen=True)
class _Counts:
    delay: int
    staleness: int
    mean_staleness: float
    in_flight: int


def count(schedule: Schedule, batches: int) -> list[_Counts]:
    """Delay, staleness and batches in flight of every stage, counted from a run of ``batches``.

    Delay and staleness are taken from the middle third of the batches: steady state.
    """
    stages = range(schedule.num_stages)
    updates = [0] * schedule.num_stages
    # (batch, micro) -> tick and weight version of its forward
    forwarded: list[dict[tuple[int, int | None], tuple[int, int]]] = [{} for _ in stages]
    returned: list[list[tuple[int, int | None]]] = [[] for _ in stages]  # not yet applied
    delays: list[list[int]] = [[] for _ in stages]
    staleness: list[list[int]] = [[] for _ in stages]
    flying: list[Counter[int]] = [Counter() for _ in stages]  # micro-batches of each batch
    peak = [0] * schedule.num_stages
    middle = range(batches // 3, 2 * batches // 3)
    for t, actions in enumerate(schedule.stream(batches)):
        for action in actions:
            k, part = action.stage, (action.batch, action.micro)
            if action.kind == "F":
                version = updates[k] if action.version is None else action.version
                forwarded[k][part] = (t, version)
                flying[k][action.batch] += 1
                peak[k] = max(peak[k], len(flying[k]))
            elif action.kind == "B":
                returned[k].append(part)
                if action.batch in middle:
                    delays[k].append(t - forwarded[k][part][0])
            else:
                for part in returned[k]:
                    version = forwarded[k].pop(part)[1]
                    flying[k][part[0]] -= 1
                    if not flying[k][part[0]]:
                        del flying[k][part[0]]
                    if part[0] in middle:
                        staleness[k].append(updates[k] - version)
                returned[k] = []
                updates[k] += 1
    return [
        _Counts(max(delays[k]), max(staleness[k]), sum(staleness[k]) / len(staleness[k]), peak[k])
        for k in stages
    ]
