"""Ticks compiled as one program, for stages that share one device or one group.

In a full pipeline the actions repeat every tick, or every few ticks. Such ticks are compiled
(`fdg_jax.engine.compiled_tick`). While the pipeline fills or drains, or its programs are observed
by a `Watch`, the actions are dispatched one by one.

The two forms may round differently, so which ticks are compiled depends only on the schedule, not
on what this process has run before. A restored run is bitwise equal to an uninterrupted one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from fdg_jax.engine.compiled_tick import FLIGHT, LABELS, OWN, VERSION, CompiledTick, Item, Place, X
from fdg_jax.engine.messages import Done, Metrics, MetricsList, failure, send
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState, Slots, StageState, StageWork, scalar
from fdg_jax.errors import ConsumedStateError
from fdg_jax.schedule import Action, Schedule
from fdg_jax.shared import plain
from fdg_jax.typing import PyTree

COMPILE = ("auto", True, False)


def compiles(stages: Sequence[Stage], wanted: str | bool) -> bool:
    """Whether ticks are compiled.

    Args:
      stages: the pipeline's stages.
      wanted: True, False, or "auto": if several stages share a device or a group.

    Raises:
      ValueError: any other value, or True with stages on different devices.
    """
    if not any(wanted is allowed or wanted == allowed for allowed in COMPILE):
        raise ValueError(f'compile={wanted!r}: must be "auto", True or False')
    together = len({stage.mesh for stage in stages}) == 1 and stages[0].here
    if wanted is True and not together:
        raise ValueError(
            "compile=True: stages on different devices cannot be one program; give one device, as "
            'in devices=jax.devices()[:1], or compile="auto"'
        )
    return together and (wanted is True or (wanted == "auto" and len(stages) > 1))


class SteadyTicks:
    """The compiled ticks of a pipeline.

    Args:
      stages: the pipeline's stages, all on the same devices.
      schedule: its schedule.
    """

    def __init__(self, stages: Sequence[Stage], schedule: Schedule) -> None:
        self._stages, self._schedule = stages, schedule
        self._from = schedule.start + 2 * (schedule.fill + 1) + schedule.period
        self._known: dict[Any, list[Steady]] = {}  # by actions; one per content of the stages
        self._devices = set(stages[0].mesh.devices.flat)
        # Distances to earlier ticks compared; a rule may not declare its period.
        self._back = dict.fromkeys([*range(1, 2 * (schedule.fill + 1)), schedule.period])
        self._actions = functools.lru_cache(2 * len(self._back))(self._actions_of)

    def step(
        self, state: PipelineState, x: PyTree, labels: PyTree
    ) -> tuple[PipelineState, MetricsList, list[Done]] | None:
        """Runs one tick.

        A schedule may change during a run and may not declare its period, so a program is reused
        only for the same actions on stages with the same contents.

        Args:
          state: consumed, unless None is returned.
          x, labels: the mini-batch that enters.

        Returns:
          The new state, the metrics, and tokens for `RunAhead`; None if the tick is not compiled.

        Raises:
          ConsumedStateError: the state has been consumed.
          StageError: tracing or compiling the program failed.
        """
        state = state.on_host()
        t = int(state.tick) - int(state.origin)
        if t < self._from or not self._returns(t):
            return None
        if self._schedule.microbatches == 1:
            x, labels = plain(x), plain(labels)
        x, labels = self._near(x), self._near(labels)
        try:
            actions, counted = self._actions(t)
            known = self._known.setdefault((counted, _versions(actions, state.stages)), [])
            steady = next((one for one in known if one.fits(state)), None)
            if steady is None:
                made = CompiledTick(self._stages, self._schedule, state, x, labels)
                steady = Steady(made, self._stages, self._schedule)
                known.append(steady)
            return steady.step(state, x, labels)
        except ConsumedStateError:
            raise
        except Exception as error:
            raise failure(self._stages, 0, "tick", int(state.tick), error) from error

    def _returns(self, t: int) -> bool:
        """Whether one of the last ticks of the full pipeline had the same actions as tick t."""
        now = self._actions(t)[1]
        return any(t - j >= self._from and self._actions(t - j)[1] == now for j in self._back)

    def _actions_of(self, t: int) -> tuple[Sequence[Action], Any]:
        """The actions of tick t, and a hashable form with mini-batches relative to t."""
        actions = self._schedule.tick(t)
        return actions, tuple((a.kind, a.stage, a.batch - t, a.micro) for a in actions)

    def _near(self, tree: PyTree) -> PyTree:
        """The batch, moved to the devices of the program if necessary."""
        for leaf in jax.tree.leaves(tree):
            if not isinstance(leaf, jax.Array) or leaf.sharding.device_set != self._devices:
                return send(tree, self._stages[0])
        return tree


class Steady:
    """Runs one compiled tick on states.

    Args:
      tick: the program.
      stages, schedule: the pipeline's.
    """

    def __init__(self, tick: CompiledTick, stages: Sequence[Stage], schedule: Schedule) -> None:
        self._tick = tick
        self._parts = schedule.microbatches
        self._changes = [_Change(tick, k, stages[k]) for k in range(len(stages))]

    def fits(self, state: PipelineState) -> bool:
        """Whether the stages' contents are those the program was made for, with numbers shifted."""
        later, updates = self._shift(state)
        rows = zip(self._tick.before, self._tick.after, state.stages, updates, strict=True)
        return all(
            _pending(now, then, after) and _same(then, now, later, made)
            for then, after, now, made in rows
        )

    def _shift(self, state: PipelineState) -> tuple[int, list[int]]:
        """The micro-batches, and the updates of each stage, since the program was made."""
        pairs = zip(state.stages, self._tick.before, strict=True)
        updates = [int(own.version) - then.version for own, then in pairs]
        return (int(state.tick) - self._tick.batch) * self._parts, updates

    def step(
        self, state: PipelineState, x: PyTree, labels: PyTree
    ) -> tuple[PipelineState, MetricsList, list[Done]]:
        tick, batch = self._tick, int(state.tick)
        later, updates = self._shift(state)

        def there(place: Place) -> PyTree:
            k, what, n = place
            if what in (X, LABELS):
                return x if what == X else labels
            return _value(state.stages[k], what, n + (updates[k] if what == VERSION else later))

        donated, given = [[there(p) for p in places] for places in (tick.donated, tick.given)]
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(donated)):
            raise ConsumedStateError
        moving = {place: jax.tree.leaves(there(place)) for place in tick.moving}
        made = tick.program(donated, given)

        def value_of(item: Item) -> PyTree:
            if item.sources is None:
                return made[item.output]
            leaves = [made[s] if isinstance(s, int) else moving[s[0]][s[1]] for s in item.sources]
            return jax.tree.unflatten(item.structure, leaves)

        values = {item.place: value_of(item) for item in tick.makes}
        stages = tuple(
            change.apply(own, values, later, moved)
            for change, own, moved in zip(self._changes, state.stages, updates, strict=True)
        )
        metrics = MetricsList()
        for of, k, item in tick.reports:
            loss, aux = value_of(item)
            metrics.append(Metrics(batch + of - tick.batch, loss, aux, k))
        tokens = [(k, own.record) for k, own in enumerate(stages)]
        done = [Done(k, "tick", batch, token) for k, token in tokens if token is not None]
        done = done or [Done(0, "tick", batch, stages[0].number)]
        return PipelineState(scalar(batch + 1), state.origin, state.key, stages), metrics, done


def _versions(actions: Sequence[Action], stages: Sequence[StageState]) -> tuple[int, ...]:
    """The weight versions named by actions, relative to the newest."""
    return tuple(
        a.version - int(stages[a.stage].version) + int(stages[a.stage].base)
        for a in actions
        if a.version is not None
    )


def _pending(now: StageState, before: StageWork, after: StageWork) -> bool:
    """Whether the program is valid for the number of pending gradients.

    An update divides by it; a backward only depends on whether there are any.
    """
    if after.version != before.version:
        return int(now.pending) == before.pending
    return bool(now.pending) == bool(before.pending)


def _same(then: StageWork, now: StageState, later: int, updates: int) -> bool:
    """Whether a stage has the same contents, shifted by ``later`` micro-batches and ``updates``."""
    size = len(now.met)
    if any(now.met[(n + later) % size] != v + updates for n, (v, _) in then.flights.items()):
        return False
    held = [(then.flights, now.flights, later), (then.versions, now.versions, updates)]
    held += [(then.inbox.get(port, {}), slots, later) for port, slots in now.inbox.items()]
    return all(
        sorted(n + by for n in numbers) == sorted(n for n in slots.numbers.tolist() if n >= 0)
        for numbers, slots, by in held
    )


def _value(own: StageState, what: str, n: int) -> PyTree:
    if what in OWN:
        return getattr(own, what)
    slots = own.flights if what == FLIGHT else own.versions if what == VERSION else own.inbox[what]
    return slots.values[n % len(slots.values)]


class _Change:
    """The changes of one stage's state in a compiled tick."""

    def __init__(self, tick: CompiledTick, k: int, stage: Stage) -> None:
        before, after = tick.before[k], tick.after[k]
        mine = [item.place for item in tick.makes if item.place[0] == k]
        self._k, self._zeros = k, stage.zeros
        self._blank: dict[str, PyTree] = {}
        self._own = [place for place in mine if place[1] in OWN]
        self._updates = after.version - before.version
        self._pending = after.pending, before.pending
        self._reset = bool(before.pending) and not after.pending
        self._flights = _Exchange(mine, FLIGHT, before.flights, after.flights)
        self._met = [(n, after.flights[n][0]) for n in self._flights.added]
        self._versions = _Exchange(mine, VERSION, before.versions, after.versions)
        ports = sorted(before.inbox.keys() | after.inbox.keys())
        self._inbox = [
            (port, _Exchange(mine, port, before.inbox.get(port, {}), after.inbox.get(port, {})))
            for port in ports
        ]

    def apply(
        self, own: StageState, values: dict[Place, PyTree], later: int, updates: int
    ) -> StageState:
        changed: dict[str, Any] = {place[1]: values[place] for place in self._own}
        if self._reset and own.gradient is not None:
            changed["gradient"] = self._blank_of("gradient", own.gradient)
        after, before = self._pending
        changed["pending"] = scalar(after if self._updates else int(own.pending) + after - before)
        if self._updates:
            changed["version"] = scalar(int(own.version) + self._updates)
        if self._flights:
            met = own.met.copy()
            for n in self._flights.left:
                met[(n + later) % len(met)] = 0
            for n, version in self._met:
                met[(n + later) % len(met)] = version + updates
            changed["met"] = met
            changed["flights"] = self._exchanged(FLIGHT, own.flights, self._flights, values, later)
        if self._versions:
            changed["versions"] = self._exchanged(
                VERSION, own.versions, self._versions, values, updates
            )
        inbox = dict(own.inbox)
        for port, exchange in self._inbox:
            if exchange:
                inbox[port] = self._exchanged(port, own.inbox[port], exchange, values, later)
        return own._replace(inbox=inbox, **changed)

    def _exchanged(
        self, what: str, slots: Slots, exchange: _Exchange, values: dict[Place, PyTree], later: int
    ) -> Slots:
        numbers, stored, size = slots.numbers.copy(), list(slots.values), len(slots.values)
        for n in exchange.left:
            i = (n + later) % size
            numbers[i], stored[i] = -1, self._blank_of(what, stored[i])
        for n in exchange.added:
            i = (n + later) % size
            numbers[i], stored[i] = n + later, values[self._k, what, n]
        return Slots(numbers, tuple(stored))

    def _blank_of(self, what: str, like: PyTree) -> PyTree:
        if what not in self._blank:
            self._blank[what] = self._zeros(like)
        return self._blank[what]


class _Exchange:
    """The numbers removed from and added to slots in a tick."""

    def __init__(
        self, places: Sequence[Place], what: str, before: dict[int, Any], after: dict[int, Any]
    ) -> None:
        self.added = [n for _, name, n in places if name == what]
        self.left = [n for n in before if n not in after]

    def __bool__(self) -> bool:
        return bool(self.added or self.left)
