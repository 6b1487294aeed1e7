"""Bookkeeping of the contents of every stage, action by action.

The bookkeeping is implemented once, here, and follows from the kinds of action alone. The engine
runs it with arrays, checkpoints with names, the simulator with bytes, and counting without values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from fdg_jax.schedule.action import ACTIVATION, COTANGENT, Action, Kind, Port

LABEL, METRIC = "label", "metric"


class Plan(Protocol):
    """The interface of a schedule to the bookkeeping; see `fdg_jax.schedule.Schedule`."""

    @property
    def name(self) -> str: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def microbatches(self) -> int: ...
    @property
    def versions(self) -> int: ...
    @property
    def period(self) -> int: ...
    @property
    def losses(self) -> tuple[int, ...]: ...
    @property
    def kind_of(self) -> dict[str, Kind]: ...
    @property
    def labelled(self) -> tuple[int, ...]: ...
    @property
    def sources(self) -> dict[str, list[list[tuple[tuple[str, int], ...]]]]: ...
    @property
    def fill(self) -> int: ...
    def tick(self, t: int, end: int | None = None) -> list[Action]: ...
    def gives(self, kind: Kind, k: int) -> Iterator[tuple[str, int]]: ...
    def takes(self, kind: Kind, k: int) -> tuple[Port, ...]: ...


class Holding:
    """The contents of one stage.

    Attributes:
      version: number of updates.
      pending: number of gradients added and not yet applied.
      flights: micro-batches in flight: the weight version of the forward, and its stored data.
      inbox: messages not yet consumed, by port and micro-batch; "label" and "metric", for parts of
        an unfinished mini-batch, are ports, too.
    """

    __slots__ = ("flights", "inbox", "pending", "version")

    def __init__(self) -> None:
        self.version = 0
        self.pending = 0
        self.flights: dict[int, tuple[int, Any]] = {}
        self.inbox: dict[str, dict[int, Any]] = {}

    def put(self, port: str, n: int, value: Any = None) -> None:
        """Stores a message of micro-batch n."""
        self.inbox.setdefault(port, {})[n] = value

    def take(self, port: str, n: int) -> Any:
        """Removes and returns the message of micro-batch n."""
        return self.inbox[port].pop(n)


class Ledger:
    """The contents of all stages.

    Micro-batches are numbered consecutively: m of mini-batch n is n * microbatches + m.

    Args:
      schedule: its kinds determine what an action takes, gives and stores.
    """

    def __init__(self, schedule: Plan) -> None:
        self._schedule, self._kinds = schedule, schedule.kind_of
        self._microbatches = schedule.microbatches
        self._losses = frozenset(schedule.losses)
        self.stages = [Holding() for _ in range(schedule.num_stages)]

    def enter(self, batch: int) -> None:
        """Enters a mini-batch: inputs to the first stage, labels to the stages that use them."""
        for n in range(batch * self._microbatches, (batch + 1) * self._microbatches):
            self.stages[0].put(ACTIVATION, n)
            for k in self._schedule.labelled:
                self.stages[k].put(LABEL, n)

    def apply(self, action: Action) -> None:
        """Records one action."""
        kind: Kind = self._kinds[action.kind]
        k, own = action.stage, self.stages[action.stage]
        if kind.gradient == "applies":
            own.version += 1
            own.pending = 0
            return
        n = action.batch * self._microbatches + (action.micro or 0)
        for port in self._schedule.takes(kind, k):
            own.take(port.name, n)
        if kind.in_flight == "opens":
            own.flights[n] = (own.version if action.version is None else action.version, None)
            if k in self._schedule.labelled:
                own.take(LABEL, n)
            if k in self._losses:
                own.put(COTANGENT, n)
                self._report(own, n)
        elif kind.in_flight == "closes":
            del own.flights[n]
        own.pending += kind.gradient == "adds"
        for name, stage in self._schedule.gives(kind, k):
            self.stages[stage].put(name, n)

    def _report(self, own: Holding, n: int) -> None:
        """Collects metrics of micro-batches until the mini-batch is complete."""
        first = n - n % self._microbatches
        parts = range(first, first + self._microbatches)
        own.put(METRIC, n)
        if all(part in own.inbox[METRIC] for part in parts):
            for part in parts:
                own.take(METRIC, part)

    def run(self, actions: Iterable[Action]) -> None:
        """Records several actions."""
        for action in actions:
            self.apply(action)


def holdings(schedule: Plan, batches: int) -> Sequence[Holding]:
    """The contents of each stage after the given number of mini-batches.

    Args:
      schedule: the schedule.
      batches: number of mini-batches since the last drain, >= 0; the cost does not depend on it,
        because schedules are periodic.

    Returns:
      One `Holding` per stage.

    Example:
      >>> from fdg_jax import schedule
      >>> first, last = holdings(schedule.fdg(2), 5)
      >>> first.flights, sorted(first.inbox["cotangent"]), sorted(last.inbox["activation"])
      ({3: (1, None), 4: (2, None)}, [3], [4])
      >>> last.version
      4
    """
    period, count = schedule.period, schedule.microbatches
    # After twice the fill every period is like the previous one.
    steady = 2 * (schedule.fill + 1) + 2 * period
    whole = max(0, (batches - steady) // period)  # periods that are skipped
    ticks = batches - whole * period
    ledger = Ledger(schedule)
    before = [0] * schedule.num_stages
    for t in range(ticks):
        if t == ticks - period:
            before = [own.version for own in ledger.stages]
        ledger.enter(t)
        ledger.run(schedule.tick(t))
    for own, version in zip(ledger.stages, before, strict=True):
        shift(own, whole * period * count, whole * (own.version - version))
    return ledger.stages


def shift(own: Holding, parts: int, updates: int) -> None:
    """Shifts a holding by a number of micro-batches and updates."""
    own.version += updates
    own.flights = {n + parts: (v + updates, value) for n, (v, value) in own.flights.items()}
    own.inbox = {
        port: {n + parts: value for n, value in found.items()} for port, found in own.inbox.items()
    }
