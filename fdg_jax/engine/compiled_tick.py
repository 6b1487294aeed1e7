"""A tick of all stages on one device, compiled as one program.

The program is traced from `fdg_jax.engine.dispatch.Tick`, so it contains the programs of the stages
in the same order. Its arguments are the values used by the actions of the tick, its results the
values they produce. Other values, such as most mini-batches in flight, do not pass through it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend.core import Literal

from fdg_jax.engine.dispatch import Tick
from fdg_jax.engine.messages import MetricsList
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState, StageState, StageWork
from fdg_jax.schedule import Schedule
from fdg_jax.typing import PyTree

# The place of a value: stage, name, and number if there are several. The name is an attribute of
# `StageWork`, a port, or one of the constants below.
Place: TypeAlias = tuple[int, str, int]
OWN = ("params", "model_state", "opt_state", "key", "number", "record", "gradient", "synthesizer")
FLIGHT, VERSION, X, LABELS, REPORT = "flight", "version", "x", "labels", "report"

# Placeholder for a leaf that is not an argument of the program. (None would not be a leaf.)
_UNUSED = object()


class Item(NamedTuple):
    """A value that the program computes or that moves between places.

    Attributes:
      place: the destination.
      structure: the tree structure of the value.
      sources: per leaf, the position of an output of the program, or place and position of a leaf
        that moves; None if the value is a single output.
      output: the position of that output.
    """

    place: Place
    structure: Any
    sources: list[int | tuple[Place, int]] | None
    output: int = 0


class Trace(NamedTuple):
    """The result of tracing a tick.

    Attributes:
      after: contents of every stage after the tick, without values.
      metrics: batch and stage of each report.
      items: place, structure and number of leaves of every value after the tick.
    """

    after: list[StageWork]
    metrics: list[tuple[int, int]]
    items: list[tuple[Place, Any, int]]


class CompiledTick:
    """The program of one tick, also used for all later ticks with the same actions.

    Args:
      programs: the stages, all on the same devices.
      schedule: the pipeline's schedule.
      state: the state before the tick.
      x, labels: the mini-batch that enters, on the devices.

    Attributes:
      batch: the number of that mini-batch.
      before, after: contents of every stage before and after the tick, without values.
      donated, given: places of the program's arguments with donated buffers, and of the others.
      moving: places whose leaves move to other places.
      makes: the new or moved values of the new state.
      reports: losses and metrics, with batch and stage of each.
    """

    def __init__(
        self,
        programs: Sequence[Stage],
        schedule: Schedule,
        state: PipelineState,
        x: PyTree,
        labels: PyTree,
    ) -> None:
        self._programs, self._schedule = programs, schedule
        self.batch, self._origin = int(state.tick), int(state.origin)
        works = [StageWork(own) for own in state.stages]
        values = _values(works) | {(0, X, 0): x, (0, LABELS, 0): labels}
        self.before = [_emptied(own) for own in works]
        self._structures: dict[Place, Any] = {}
        self._inputs: list[tuple[Place, int]] = []
        leaves = []
        for place, value in values.items():
            own, self._structures[place] = jax.tree.flatten(value)
            self._inputs += [(place, i) for i in range(len(own))]
            leaves += own
        self._layout(state, leaves)
        self.program = jax.jit(self._run, donate_argnums=0)

    def _layout(self, state: PipelineState, leaves: list[Any]) -> None:
        """Determines the values that the tick uses and produces."""
        traces: list[Trace] = []

        def tick(*leaves: Any) -> list[Any]:
            values, start = {}, 0
            for place, structure in self._structures.items():
                end = start + structure.num_leaves
                values[place] = jax.tree.unflatten(structure, leaves[start:end])
                start = end
            _, trace, outputs = self._tick(values)
            traces.append(trace)
            return outputs

        jaxpr = jax.make_jaxpr(tick)(*leaves).jaxpr
        (trace,) = traces
        self.after = trace.after
        position = {var: i for i, var in enumerate(jaxpr.invars)}
        used = {var for eqn in jaxpr.eqns for var in eqn.invars if not isinstance(var, Literal)}
        made = [None if isinstance(v, Literal) else position.get(v) for v in jaxpr.outvars]
        # The mini-batch always passes through the program, even unchanged.
        fresh = {i for i, (place, _) in enumerate(self._inputs) if place[1] in (X, LABELS)}
        made = [None if i in fresh else i for i in made]
        self.makes: list[Item] = []
        self.reports: list[tuple[int, int, Item]] = []
        self._returned: list[Place | int] = []
        start, moving = 0, set()
        for place, structure, size in trace.items:
            outputs = range(start, start + size)
            start += size
            moved = [made[o] for o in outputs]
            there = [self._inputs[i] for i in moved if i is not None]
            if place in self._structures and there == [(place, leaf) for leaf in range(size)]:
                continue  # unchanged
            moving |= {source for source, _ in there}
            known = _structure(state, place) or structure
            if known == structure and not there:
                item = Item(place, known, None, len(self._returned))
                self._returned.append(place)
            else:
                sources: list[int | tuple[Place, int]] = []
                for output, i in zip(outputs, moved, strict=True):
                    sources.append(len(self._returned) if i is None else self._inputs[i])
                    self._returned += [output] if i is None else []
                item = Item(place, known, sources)
            if place[1] == REPORT:
                self.reports.append((*trace.metrics[place[2]], item))
            else:
                self.makes.append(item)
        self.moving = sorted(moving)
        changed = {item.place for item in self.makes}
        taken = {self._inputs[i][0] for i, var in enumerate(jaxpr.invars) if var in used}
        taken |= {place for place, _ in self._inputs if place[1] in (X, LABELS)}
        self.donated = [
            place
            for place in self._structures
            if place in taken - moving and self._consumed(place, changed)
        ]
        self.given = [p for p in self._structures if p in taken and p not in self.donated]

    def _consumed(self, place: Place, changed: set[Place]) -> bool:
        """Whether only the consumed state refers to these buffers."""
        k, what, _ = place
        if place not in changed:
            return False
        if what in ("opt_state", "gradient", "synthesizer"):
            return True
        # Messages, flights and older versions may share buffers with weights or model state.
        alone = not self.after[k].flights and not self.before[k].flights
        if what == "params":
            kept = self._schedule.tied is not None or self._schedule.versions > 1
            return not kept and self.before[k].version not in self.after[k].versions
        return what == "model_state" and alone

    def _run(self, donated: list[PyTree], given: list[PyTree]) -> list[PyTree]:
        values = dict(zip((*self.donated, *self.given), (*donated, *given), strict=True))
        for place, structure in self._structures.items():
            if place not in values:
                unused = [_UNUSED] * structure.num_leaves
                values[place] = jax.tree.unflatten(structure, unused)
        after, _, outputs = self._tick(values)
        return [outputs[one] if isinstance(one, int) else after[one] for one in self._returned]

    def _tick(self, values: dict[Place, PyTree]) -> tuple[dict[Place, PyTree], Trace, list[Any]]:
        """The values after the tick, their description, and their leaves."""
        works = [_filled(own, k, values) for k, own in enumerate(self.before)]
        tick = Traced(self._programs, self._schedule, works, self.batch, self._origin)
        tick.enter(*(self._programs[0].placed(values[0, what, 0]) for what in (X, LABELS)))
        tick.run(self._schedule.tick(self.batch - self._origin))
        after = _values(works)
        after |= {(0, REPORT, i): (one.loss, one.aux) for i, one in enumerate(tick.metrics)}
        outputs: list[Any] = []
        items = []
        for place, value in after.items():
            own, structure = jax.tree.flatten(value)
            outputs += own
            items.append((place, structure, len(own)))
        metrics = [(one.batch, one.stage) for one in tick.metrics]
        return after, Trace([_emptied(own) for own in works], metrics, items), outputs


class Traced(Tick):
    """A tick on tracers, without transfers."""

    def __init__(
        self,
        programs: Sequence[Stage],
        schedule: Schedule,
        stages: list[StageWork],
        batch: int,
        origin: int,
    ) -> None:
        self.programs, self.schedule, self.watch = programs, schedule, None
        self.stages, self.batch, self.origin = stages, batch, origin
        self.metrics, self.weight, self.done = MetricsList(), None, []

    def send(self, tree: PyTree, k: int) -> PyTree:
        """Returns the tree: all stages share their devices."""
        return tree


def _values(works: Sequence[StageWork]) -> dict[Place, PyTree]:
    """The contents of stages, by place."""
    found: dict[Place, PyTree] = {}
    for k, own in enumerate(works):
        found |= {(k, name, 0): getattr(own, name) for name in OWN}
        found |= {(k, FLIGHT, n): stash for n, (_, stash) in own.flights.items()}
        found |= {(k, VERSION, v): params for v, params in own.versions.items()}
        for port, there in own.inbox.items():
            found |= {(k, port, n): value for n, value in there.items()}
    return found


def _emptied(work: StageWork) -> StageWork:
    """A stage's bookkeeping without values."""
    own = copy.copy(work)
    for name in OWN:
        setattr(own, name, None)
    own.flights = {n: (version, None) for n, (version, _) in work.flights.items()}
    own.versions = dict.fromkeys(work.versions)
    own.inbox = {port: dict.fromkeys(there) for port, there in work.inbox.items()}
    return own


def _filled(empty: StageWork, k: int, values: dict[Place, PyTree]) -> StageWork:
    """The inverse of `_emptied`, for stage k."""
    own = copy.copy(empty)
    for name in OWN:
        setattr(own, name, values[k, name, 0])
    own.flights = {n: (v, values[k, FLIGHT, n]) for n, (v, _) in empty.flights.items()}
    own.versions = {v: values[k, VERSION, v] for v in empty.versions}
    own.inbox = {
        port: {n: values[k, port, n] for n in there} for port, there in empty.inbox.items()
    }
    return own


def _structure(state: PipelineState, place: Place) -> Any:
    """The structure of the values at a place in a state; None if there are none."""
    k, what, _ = place
    own: StageState = state.stages[k]
    if what == REPORT:
        return None
    if what in OWN:
        return jax.tree.structure(getattr(own, what))
    slots = {FLIGHT: own.flights, VERSION: own.versions, **own.inbox}.get(what)
    if slots is None or not slots.values:
        return None
    filled = [value for _, value in slots.items()]
    return jax.tree.structure(filled[0] if filled else slots.values[0])
