"""Records when programs ran, without changing the run.

The pipeline passes a token of every dispatched program to one thread per device, which waits for
the tokens in the order of the device's queue and notes the times. Nothing else waits, and the
programs are unchanged. JAX reports when a program ends, but not when it starts. A device processes
its queue in order, so the start is inferred:

    end      when its token is ready
    start    max(end of the previous program on the same device,
                 start of its dispatch,
                 end of the programs that produce its inputs)

So transfer time counts as work of the receiving stage, and so does compilation: record after all
programs have been compiled. Other programs (augmentation, evaluation) are not recorded; the first
stage's inputs are waited for like all others.
"""

from __future__ import annotations

import contextlib
import queue
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from fdg_jax.analysis.costs import Costs
from fdg_jax.analysis.simulate import enough, simulate
from fdg_jax.analysis.timeline import Event, Timeline
from fdg_jax.engine.fusion import fuse
from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.engine.rules import gradient_rule
from fdg_jax.schedule.action import Action
from fdg_jax.schedule.schedule import Schedule
from fdg_jax.typing import PyTree


class Recorder:
    """Records the programs of a pipeline until the given number of mini-batches has entered.

    If programs of earlier ticks may still be running, the first tick only serves to determine when
    the devices become free.

    Args:
      pipe: the pipeline.
      batches: number of mini-batches to record, >= 1; a drain after them is included.

    Raises:
      ValueError: batches < 1, a pipeline that is already recorded or runs in several processes.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fdg_jax as fdg
      >>> layers = [fdg.Layer(lambda key, x: (jnp.ones(()), ()),
      ...                     lambda p, s, x, *, train, key: (p * x, s)) for _ in range(2)]
      >>> pipe = fdg.Pipeline(layers, lambda y, t: (jnp.mean((y - t) ** 2), {}),
      ...                     lambda k: optax.sgd(0.1), fdg.schedule.fdg(2))
      >>> state = pipe.init(jax.random.key(0), jnp.ones((4, 1)))
      >>> recorder = Recorder(pipe, batches=3)
      >>> for _ in range(3):
      ...     state, metrics = pipe.step(state, (jnp.ones((4, 1)), jnp.zeros((4, 1))))
      >>> run = recorder.timeline()
      >>> [f"{event.label}@{event.action.stage}" for event in run.events]
      ['F0@0', 'F0 B0 U@1', 'F1@0', 'F1 B1 U@1', 'F2@0', 'B0 U@0']
    """

    def __init__(self, pipe: Pipeline, batches: int) -> None:
        if batches < 1:
            raise ValueError(f"batches={batches}: record at least one")
        if pipe.watch is not None:
            raise ValueError("pipe: is recorded already; call timeline() of its recorder first")
        if jax.process_count() > 1:
            raise ValueError(
                f"pipe: runs in {jax.process_count()} processes, and the clock of each is its own; "
                "record a pipeline of one process"
            )
        self._pipe = pipe
        self._lead = 0 if pipe.idle else 1  # ticks that are not reported
        self._left = batches + self._lead
        groups = [tuple(stage.mesh.devices.flat) for stage in pipe.stages]
        distinct = list(dict.fromkeys(groups))
        self._device = [distinct.index(group) for group in groups]  # of every stage
        self._queues = [_Queue() for _ in distinct]
        self._programs: list[_Program] = []
        self._tick = -1
        for thread in self._queues:
            thread.start()
        pipe.watch = self

    @property
    def recording(self) -> bool:
        """Whether programs are still being added."""
        return self._pipe.watch is self

    def entered(self, batch: int, inputs: PyTree) -> None:
        """See `fdg_jax.engine.dispatch.Watch`."""
        if self._left == 0:
            self._stop()
            return
        self._left -= 1
        self._tick += 1
        self._add((), time.perf_counter(), 0, inputs, batch)

    def dispatched(self, actions: Sequence[Action], since: float, token: jax.Array) -> None:
        """See `fdg_jax.engine.dispatch.Watch`."""
        if self.recording and self._tick >= 0:
            first = actions[0]
            self._add(tuple(actions), since, self._device[first.stage], token, first.batch)

    def timeline(self) -> Timeline:
        """Ends the recording and waits for the recorded programs.

        Returns:
          The events, with times in seconds from the first, and their mean costs. The run's metrics
          are the same as without a recorder.

        Raises:
          ValueError: nothing has been recorded.
        """
        self._stop()
        for thread in self._queues:
            thread.join()
        events = self._events()
        if not events:
            raise ValueError("batches: nothing has been recorded; take steps before timeline()")
        zero = min(event.start for event in events)
        events = [replace(e, start=e.start - zero, end=e.end - zero) for e in events]
        schedule, gradient = self._pipe.schedule, gradient_rule(self._pipe.gradient)
        costs = costs_of(schedule, gradient, events)
        baseline = simulate(schedule, costs, 1, gradient, self._device).baseline
        return Timeline(schedule, costs, gradient, events, baseline)

    def _add(
        self, actions: tuple[Action, ...], since: float, device: int, token: PyTree, batch: int
    ) -> None:
        thread = self._queues[device]
        place = len(self._programs)
        self._programs.append(_Program(actions, since, device, batch, self._tick))
        thread.tokens.put((place, token))

    def _stop(self) -> None:
        if self.recording:
            self._pipe.watch = None
            for thread in self._queues:
                thread.tokens.put(None)

    def _events(self) -> list[Event]:
        """The dispatched programs, with inferred start times."""
        ends: dict[int, float] = {}
        for thread in self._queues:
            ends |= thread.ends
        sources = self._sources()
        # Threads may notice an end late, but a program ends before those that depend on it.
        for place in reversed(range(len(self._programs))):
            for source in sources[place]:
                ends[source] = min(ends[source], ends[place])
        events = []
        for place, program in enumerate(self._programs):
            if program.actions and program.tick >= self._lead:
                start = max([program.since, *(ends[source] for source in sources[place])])
                first, *rest = program.actions
                events.append(Event(first, start, ends[place], program.device, tuple(rest)))
        return events

    def _sources(self) -> list[list[int]]:
        """The recorded programs that must end before each program starts."""
        last: dict[int, int] = {}  # of each device
        entered: dict[int, int] = {}  # mini-batch -> its inputs
        made: dict[Action, int] = {}
        kinds = self._pipe.schedule.kind_of
        found = []
        for place, program in enumerate(self._programs):
            sources: list[int | None] = []
            if not program.actions:
                entered[program.batch] = place
            else:
                first = program.actions[0]
                sources.append(last.get(program.device))
                if first.stage == 0 and kinds[first.kind].in_flight == "opens":
                    sources.append(entered.get(first.batch))
                sources += [made.get(need) for need in self._pipe.schedule.needs(first)]
                last[program.device] = place
                made |= {action._replace(version=None): place for action in program.actions}
            found.append([source for source in sources if source is not None])
        return found


@dataclass(frozen=True)
class _Program:
    """A dispatched program: actions of one stage, or none for a mini-batch that entered."""

    actions: tuple[Action, ...]
    since: float
    device: int
    batch: int
    tick: int


class _Queue(threading.Thread):
    """Waits for the programs of a device in order and notes their end times."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="fdg_jax recorder")
        self.tokens: queue.SimpleQueue[tuple[int, PyTree] | None] = queue.SimpleQueue()
        self.ends: dict[int, float] = {}

    def run(self) -> None:
        while (item := self.tokens.get()) is not None:
            place, token = item
            # A failed program has ended, too; the pipeline reports the error.
            with contextlib.suppress(Exception):
                jax.block_until_ready(token)
            self.ends[place] = time.perf_counter()


def costs_of(schedule: Schedule, gradient: str | GradientRule, events: Sequence[Event]) -> Costs:
    """Durations of actions, from the mean durations of programs.

    If forward, backward and update of a stage are always one program, its whole time counts as
    backward.

    Args:
      schedule: the schedule of the events.
      gradient: the pipeline's gradient rule; the time of a recomputed forward is subtracted.
      events: measured events.

    Returns:
      Seconds of one undivided mini-batch.
    """
    seconds: dict[tuple[int, str], list[float]] = {}
    for event in events:
        # A backward with a predicted cotangent counts as a backward.
        kinds = "".join(action.kind for action in event.actions).replace("P", "B")
        seconds.setdefault((event.action.stage, kinds), []).append(event.end - event.start)
    mean = {key: statistics.fmean(values) for key, values in seconds.items()}
    again = not gradient_rule(gradient).keeps_residuals
    forward, backward, update, weights = [], [], [], []
    for k in range(schedule.num_stages):
        f, w = mean.get((k, "F"), 0.0), mean.get((k, "W"), 0.0)
        both, all_three = mean.get((k, "BU"), 0.0), mean.get((k, "FBU"), 0.0)
        b = mean.get((k, "B"), both or max(all_three - f, 0.0))
        u = mean.get((k, "U"), max(both - b, all_three - f - b, 0.0))
        if again and f:
            b, w = max(b - f, 0.0), max(w - f, 0.0)
        forward.append(f * schedule.microbatches)
        backward.append((b + w) * schedule.microbatches)
        weights.append(w * schedule.microbatches)
        update.append(u)
    return Costs(forward, backward, update, weights=weights if schedule.splits_backward else ())


def expected(run: Timeline) -> Timeline:
    """Simulates a measured run: the same programs, each with its mean duration.

    Args:
      run: the timeline of a `Recorder`.

    Returns:
      The simulated timeline of the same programs, without any other delays.

    Raises:
      ValueError: the schedule is not that of the events.
    """
    schedule = run.schedule
    device = {event.action.stage: event.device for event in run.events}
    shared = [device.get(k, k) for k in range(schedule.num_stages)]
    seen = {(a.kind, a.batch, a.micro, a.stage) for event in run.events for a in event.actions}
    batches = [n for _, n, _, _ in seen]
    closing = [kind.name for kind in schedule.kinds if kind.in_flight == "closes"]
    micro = None if schedule.microbatches == 1 else 0
    drained = any((kind, max(batches), micro, 0) in seen for kind in closing)
    # Long after the fill every period is like the previous one.
    shift = max(min(batches) - enough(schedule), 0) // schedule.period * schedule.period
    count = max(batches) + 1 - shift + (0 if drained else enough(schedule))
    whole = simulate(schedule, run.costs, count, run.gradient, shared)
    left, events = iter(whole.events), []
    for actions in schedule.stream(count):
        for group in fuse(actions, schedule):
            parts = [next(left) for _ in group]
            moved = tuple(_later(action, shift, schedule) for action in group)
            first = moved[0]
            if (first.kind, first.batch, first.micro, first.stage) in seen:
                event = Event(first, parts[0].start, parts[-1].end, parts[0].device, moved[1:])
                events.append(event)
    if not events:
        raise ValueError(f"run: its events are not those of schedule {schedule.name}")
    zero = min(event.start for event in events)
    events = [replace(e, start=e.start - zero, end=e.end - zero) for e in events]
    return replace(whole, events=events)


def _later(action: Action, batches: int, schedule: Schedule) -> Action:
    """The same action, later by a number of batches that is a multiple of the period."""
    version = action.version
    if version is not None:
        version += batches // schedule.period
    return action._replace(batch=action.batch + batches, version=version)
