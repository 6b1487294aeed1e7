"""Who does what when: schedules as streams of actions.

A schedule is a rule that maps a tick to actions. ``F3@1``: stage 1 forwards batch 3; ``B1@0``:
stage 0 back-propagates batch 1; ``U@0``: stage 0 applies the gradient that it has accumulated.
Everything else (delay, staleness, what is in flight) is counted from the stream of actions.

FDG with three stages, ticks downwards; no stage waits for another inside a tick:

    tick | stage 0   stage 1   stage 2
       0 | F0
       1 | F1        F0
       2 | F2        F1        F0 B0 U
       3 | F3        F2 B0 U   F1 B1 U
       4 | F4 B0 U   F3 B1 U   F2 B2 U
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Action:
    """One thing that one stage does.

    Args:
      kind: "F" forward, "B" backward, "U" update.
      batch: number of the mini-batch; for an update, of the last batch whose gradient it applies.
      stage: 0 is next to the input.

    Example:
      >>> print(Action("F", 3, 1), Action("U", 3, 1))
      F3@1 U@1
    """

    kind: Literal["F", "B", "U"]
    batch: int
    stage: int

    @property
    def label(self) -> str:
        """The action without its stage, as it stands in a cell of the grid."""
        return "U" if self.kind == "U" else f"{self.kind}{self.batch}"

    def __str__(self) -> str:
        return f"{self.label}@{self.stage}"


Rule = Callable[[int], Sequence[Action]]
Order = Literal["forward_first", "backward_first"]


@dataclass(frozen=True)
class Schedule:
    """A rule from ticks to actions, and what follows from it.

    Args:
      name: as the field calls it.
      num_stages: K.
      rule: the actions of a tick in an order in which they can be dispatched. It may name batches
        that do not exist (numbers below 0 during the fill, beyond the last during the drain): those
        actions fall away.
    """

    name: str
    num_stages: int
    rule: Rule

    def tick(self, t: int, end: int | None = None) -> list[Action]:
        """The actions of tick ``t`` (0 is the first of the fill) when batches 0..end-1 exist."""
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
        while backwards < batches * self.num_stages:
            actions = self.tick(t, batches)
            idle += 1
            for action in actions:
                if action.kind != "U":
                    self._check(action, done)
                    done.add(action)
                    idle = 0
                    backwards += action.kind == "B"
                if action.kind != "F":
                    waiting[action.stage] = action.batch if action.kind == "B" else -1
            if idle > 8 * self.num_stages:
                raise ValueError(f"schedule {self.name}: after tick {t} batches are left in flight")
            t += 1
            if backwards == batches * self.num_stages:
                actions = actions + [Action("U", n, k) for k, n in waiting.items() if n >= 0]
            yield actions

    def _check(self, action: Action, done: set[Action]) -> None:
        k, n = action.stage, action.batch
        if not 0 <= k < self.num_stages:
            raise ValueError(
                f"schedule {self.name}: {action}, but there are {self.num_stages} stages"
            )
        if action in done:
            raise ValueError(f"schedule {self.name}: {action} comes twice")
        needs = [Action("F", n, k - 1)] if action.kind == "F" else [Action("F", n, k)]
        needs += [Action("B", n, k + 1)] if action.kind == "B" else []
        for need in needs:
            if 0 <= need.stage < self.num_stages and need not in done:
                raise ValueError(f"schedule {self.name}: {action} comes before {need}")

    def delay(self, k: int) -> int:
        """Ticks between the forward and the backward of one mini-batch in stage k."""
        return self._of(k).delay

    def staleness(self, k: int) -> int:
        """Updates of stage k between a batch's forward and the moment its gradient is applied.

        The largest in steady state; see `mean_staleness`.
        """
        return self._of(k).staleness

    def mean_staleness(self, k: int) -> float:
        """The mean of what `staleness` is the largest of."""
        return self._of(k).mean_staleness

    def in_flight(self, k: int) -> int:
        """The most batches that stage k has forwarded and whose gradient it has not applied."""
        return self._of(k).in_flight

    def _of(self, k: int) -> _Counts:
        if not 0 <= k < self.num_stages:
            raise ValueError(f"k={k}: schedule {self.name} has stages 0 to {self.num_stages - 1}")
        return self._counted[k]

    @functools.cached_property
    def _counted(self) -> list[_Counts]:
        # Long enough that the middle third is steady state for every schedule of this module.
        return count(self, 12 * self.num_stages)

    def grid(self, ticks: int) -> str:
        """The first ``ticks`` ticks as text: ticks down, stages across."""
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
    forwarded: list[dict[int, tuple[int, int]]] = [{} for _ in stages]  # batch -> (tick, updates)
    returned: list[list[int]] = [[] for _ in stages]  # back-propagated, not yet applied
    delays: list[list[int]] = [[] for _ in stages]
    staleness: list[list[int]] = [[] for _ in stages]
    peak = [0] * schedule.num_stages
    middle = range(batches // 3, 2 * batches // 3)
    for t, actions in enumerate(schedule.stream(batches)):
        for action in actions:
            k, n = action.stage, action.batch
            if action.kind == "F":
                forwarded[k][n] = (t, updates[k])
                peak[k] = max(peak[k], len(forwarded[k]))
            elif action.kind == "B":
                returned[k].append(n)
                if n in middle:
                    delays[k].append(t - forwarded[k][n][0])
            else:
                for batch in returned[k]:
                    version = forwarded[k].pop(batch)[1]
                    if batch in middle:
                        staleness[k].append(updates[k] - version)
                returned[k] = []
                updates[k] += 1
    return [
        _Counts(max(delays[k]), max(staleness[k]), sum(staleness[k]) / len(staleness[k]), peak[k])
        for k in stages
    ]


def _check_stages(num_stages: int) -> None:
    if num_stages < 1:
        raise ValueError(f"num_stages={num_stages}: a network has at least one stage")


def backprop(num_stages: int) -> Schedule:
    """Ordinary back-propagation: every stage waits for its neighbours (all three locks).

    Args:
      num_stages: K.

    Returns:
      Delay 0, staleness 0 in every stage.

    Example:
      >>> print(backprop(2).grid(2))
      tick | stage 0   stage 1
         0 | F0 B0 U   F0 B0 U
         1 | F1 B1 U   F1 B1 U
    """
    _check_stages(num_stages)

    def rule(t: int) -> list[Action]:
        actions = [Action("F", t, k) for k in range(num_stages)]
        for k in reversed(range(num_stages)):
            actions += [Action("B", t, k), Action("U", t, k)]
        return actions

    return Schedule("backprop", num_stages, rule)


def fdg(num_stages: int, order: Order = "forward_first") -> Schedule:
    """Fully decoupled learning with delayed gradients: no lock is left.

    In tick t stage k forwards batch t-k, back-propagates batch t-2(K-1)+k and updates. What a stage
    sends in a tick is used by its neighbour in the next. The last stage does forward, backward and
    update of one batch in one tick.

    Args:
      num_stages: K.
      order: what the stages below the last do first in a tick. "forward_first" is the paper's
        figure, staleness 2(K-1-k); "backward_first" is the authors' released code, staleness
        2(K-1-k)-1 for k < K-1.

    Returns:
      Delay 2(K-1-k) in stage k.

    Raises:
      ValueError: K < 1, or another order.

    Example:
      >>> print(fdg(2).grid(3))
      tick | stage 0   stage 1
         0 | F0
         1 | F1        F0 B0 U
         2 | F2 B0 U   F1 B1 U

    References:
      Zhuang et al., `Fully Decoupled Neural Network Learning Using Delayed Gradients
      <https://arxiv.org/abs/1906.09108>`_, 2022.
    """
    _check_stages(num_stages)
    if order not in ("forward_first", "backward_first"):
        raise ValueError(f'order={order!r}: allowed are "forward_first" and "backward_first"')

    def rule(t: int) -> list[Action]:
        actions = []
        for k in reversed(range(num_stages)):
            n = t - 2 * (num_stages - 1) + k
            forward, back = [Action("F", t - k, k)], [Action("B", n, k), Action("U", n, k)]
            last = k == num_stages - 1
            actions += forward + back if order == "forward_first" or last else back + forward
        return actions

    return Schedule("fdg", num_stages, rule)
