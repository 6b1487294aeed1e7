"""Counts derived from a schedule: delay, staleness, mini-batches in flight, slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from fdg_jax.schedule.action import UPDATE, Action
from fdg_jax.schedule.ledger import Holding, Ledger, Plan

# Number of periods in the steady-state window. Rules that do not declare their period also repeat
# in it, if it is at most four ticks.
_WINDOW = 12


@dataclass
class Counts:
    """Counts of one stage.

    Attributes:
      delay: ticks between the forward and the backward of a batch, the largest in steady state.
      staleness, mean_staleness: updates between a batch's forward and the use of its gradient.
      in_flight: the most mini-batches forwarded whose gradient is not yet applied.
      slots: number of slots needed between two ticks, by contents ("flight", "version", "kept", and
        the ports); number n is in slot n modulo that.
      gradients: the maximum number of gradients in one update.
      pending: whether a sum of gradients is pending between two ticks.
    """

    delay: int = 0
    staleness: int = 0
    mean_staleness: float = 0.0
    in_flight: int = 0
    gradients: int = 0
    slots: Counter[str] = field(default_factory=Counter)
    pending: bool = False


def fill_of(schedule: Plan) -> int:
    """The first tick in which stage 0 finishes a micro-batch, which ends the fill.

    Raises:
      ValueError: it never does.
    """
    closing = {kind.name for kind in schedule.kind_of.values() if kind.in_flight == "closes"}
    limit = 16 * (schedule.num_stages + schedule.period) + 64
    for t in range(limit):
        if any(a.stage == 0 and a.kind in closing for a in schedule.tick(t)):
            return t
    raise ValueError(
        f"schedule {schedule.name}: after {limit} ticks batches are left in flight in stage 0"
    )


def stream(schedule: Plan, batches: int) -> Iterator[list[Action]]:
    """The actions of a run, tick by tick; see `fdg_jax.schedule.Schedule.stream`."""
    checker = Checker(schedule)
    adding = {kind.name for kind in schedule.kind_of.values() if kind.gradient == "adds"}
    t = idle = gradients = 0
    total = batches * schedule.num_stages * schedule.microbatches
    while True:
        actions = schedule.tick(t, batches)
        if gradients == total and not actions:
            return
        checker.check(t, actions)
        idle = 0 if any(a.kind != UPDATE.name for a in actions) else idle + 1
        gradients += sum(a.kind in adding for a in actions)
        if idle > 8 * schedule.num_stages + schedule.period:
            raise ValueError(f"schedule {schedule.name}: after tick {t} batches are left in flight")
        t += 1
        if gradients == total and any(n >= 0 for n in checker.pending):
            left = enumerate(checker.pending)
            actions = actions + [Action(UPDATE.name, n, k) for k, n in left if n >= 0]
            checker.pending = [-1] * schedule.num_stages
        yield actions


def count(schedule: Plan, fill: int) -> list[Counts]:
    """The counts of every stage, from the fill and a few periods after it."""
    kinds, micro = schedule.kind_of, schedule.microbatches
    ledger = Ledger(schedule)
    found = [Counts() for _ in ledger.stages]
    applied: list[list[int]] = [[] for _ in found]  # staleness of each micro-batch in the window
    entered: list[dict[int, int]] = [{} for _ in found]  # tick of each forward
    waiting: list[list[tuple[int, int]]] = [[] for _ in found]  # gradients not yet applied
    flying: list[Counter[int]] = [Counter() for _ in found]  # micro-batches of each mini-batch
    begin = 2 * (fill + schedule.period)
    window = range(begin, begin + _WINDOW * schedule.period)
    for t, actions in zip(range(window.stop), _endless(schedule), strict=False):
        ledger.enter(t)
        for action in actions:
            k, own, kind = action.stage, ledger.stages[action.stage], kinds[action.kind]
            n = action.batch * micro + (action.micro or 0)
            if kind.gradient == "adds":
                waiting[k].append((n, own.flights[n][0]))
            if kind.in_flight == "closes":
                first = entered[k].pop(n)
                if t in window:
                    found[k].delay = max(found[k].delay, t - first)
            if kind.gradient == "applies":
                found[k].gradients = max(found[k].gradients, len(waiting[k]))
                for part, version in waiting[k]:
                    if t in window:
                        applied[k].append(own.version - version)
                    flying[k][part // micro] -= 1
                    if not flying[k][part // micro]:
                        del flying[k][part // micro]
                waiting[k] = []
            ledger.apply(action)
            if kind.in_flight == "opens":
                entered[k][n] = t
                flying[k][action.batch] += 1
                found[k].in_flight = max(found[k].in_flight, len(flying[k]))
        for own, counts in zip(ledger.stages, found, strict=True):
            _widen(counts, own, schedule.versions, steady=t in window)
    for own_counts, values in zip(found, applied, strict=True):
        own_counts.staleness = max(values, default=0)
        own_counts.mean_staleness = sum(values) / len(values) if values else 0.0
    return found


def _widen(counts: Counts, own: Holding, versions: int, steady: bool) -> None:
    """Enlarges the slots to what a stage holds after a tick."""
    held: dict[str, Collection[int]] = {"flight": own.flights, **own.inbox}
    if steady:
        kept = range(max(own.version - versions + 1, 0), own.version)
        met = {version for version, _ in own.flights.values()}
        held |= {"version": (met | set(kept)) - {own.version}, "kept": kept}
        counts.pending |= own.pending > 0
    for name, numbers in held.items():
        # Outside of steady state stages hold less, which rarely needs more slots.
        if numbers and (steady or len(numbers) > counts.slots[name]):
            span = max(numbers) - min(numbers) + 1
            counts.slots[name] = max(counts.slots[name], span)


def _endless(schedule: Plan) -> Iterator[list[Action]]:
    checker = Checker(schedule)
    t = 0
    while True:
        actions = schedule.tick(t)
        checker.check(t, actions)
        yield actions
        t += 1


class Checker:
    """Validates a stream: no action occurs twice or before its dependencies."""

    def __init__(self, schedule: Plan) -> None:
        self._schedule = schedule
        self._kinds = schedule.kind_of
        self._done: set[tuple[str, int, int | None, int]] = set()
        self.pending = [-1] * schedule.num_stages  # the last batch with a pending gradient

    def check(self, t: int, actions: list[Action]) -> None:
        """Validates one tick.

        Raises:
          ValueError: an action is invalid.
        """
        schedule = self._schedule
        for action in actions:
            kind, k = self._kinds.get(action.kind), action.stage
            if kind is None:
                raise ValueError(f"schedule {schedule.name}: {action} is of none of its kinds")
            if not 0 <= k < schedule.num_stages:
                raise ValueError(
                    f"schedule {schedule.name}: {action}, but there are "
                    f"{schedule.num_stages} stages"
                )
            if kind.gradient == "applies":
                if self.pending[k] < 0:
                    raise ValueError(
                        f"schedule {schedule.name}: {action} in tick {t} applies nothing"
                    )
                self.pending[k] = -1
                continue
            own = (action.kind, action.batch, action.micro, k)
            if own in self._done:
                raise ValueError(f"schedule {schedule.name}: {action} comes twice")
            for alternatives in schedule.sources[action.kind][k]:
                needs = [Action(name, action.batch, j, action.micro) for name, j in alternatives]
                if not any((a.kind, a.batch, a.micro, a.stage) in self._done for a in needs):
                    need = " or ".join(map(str, needs))
                    raise ValueError(f"schedule {schedule.name}: {action} comes before {need}")
            self._done.add(own)
            if kind.gradient == "adds":
                self.pending[k] = action.batch
