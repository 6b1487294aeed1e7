"""Timelines: the events of a run, and quantities derived from them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fdg_jax.analysis.costs import Costs
from fdg_jax.analysis.memory import Held, bytes_of, held
from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.schedule.action import Action
from fdg_jax.schedule.schedule import Schedule


@dataclass(frozen=True)
class Event:
    """The execution of one action, or of several in one program.

    Args:
      action: the first action.
      start: seconds from the start of the run.
      end: seconds from the start of the run.
      device: number of its device.
      also: the other actions.
    """

    action: Action
    start: float
    end: float
    device: int
    also: tuple[Action, ...] = ()

    @property
    def actions(self) -> tuple[Action, ...]:
        """All actions, in order."""
        return (self.action, *self.also)

    @property
    def label(self) -> str:
        """The actions as printed in a cell of the grid."""
        return " ".join(action.label for action in self.actions)

    def within(self, begin: float, end: float) -> float:
        """Seconds of the event between two times."""
        return max(min(self.end, end) - max(self.start, begin), 0)


@dataclass(frozen=True)
class Timeline:
    """The events of a run: `simulate` computes it, `Recorder` measures it.

    Steady-state values are taken over a whole number of periods in the second half of the
    mini-batches that all stages finish before the last one enters; they are exact once the run is
    periodic.

    Args:
      schedule: the schedule.
      costs: durations of actions and sizes of data.
      gradient: the gradient rule.
      events: the events, in the order of the schedule's stream.
      baseline: batches per second of back-propagation with the same costs.
    """

    schedule: Schedule
    costs: Costs
    gradient: GradientRule
    events: Sequence[Event]
    baseline: float

    @functools.cached_property
    def makespan(self) -> float:
        """Seconds from the start to the end of the last action."""
        return max(event.end for event in self.events)

    @property
    def throughput(self) -> float:
        """Mini-batches per second in steady state.

        Raises:
          ValueError: the run is too short for a steady state.
        """
        batches, begin, end = self._steady
        return batches / (end - begin)

    @property
    def speedup(self) -> float:
        """`throughput` relative to back-propagation with the same costs, stages and transfers."""
        return self.throughput / self.baseline

    def utilisation(self, k: int) -> float:
        """The fraction of time, in steady state, in which stage k's device runs stage k.

        Args:
          k: the stage.

        Returns:
          0 to 1. Recomputed forwards count as work.

        Raises:
          ValueError: no such stage, or the run is too short for a steady state.
        """
        own, (_, begin, end) = self._own(k), self._steady
        return sum(event.within(begin, end) for event in own) / (end - begin)

    def at_once(self) -> list[float]:
        """The distribution of the number of stages that work at the same time.

        Returns:
          Fractions of time, in steady state, in which 0, 1, ..., K stages work; their sum is 1.

        Raises:
          ValueError: the run is too short for a steady state.

        Example:
          >>> from fdg_jax import schedule
          >>> from fdg_jax.analysis import simulate
          >>> costs = simulate.Costs(forward=[1, 1], backward=[2, 2])
          >>> simulate.simulate(schedule.fdg(2), costs).at_once()
          [0.0, 0.0, 1.0]
          >>> simulate.simulate(schedule.backprop(2), costs).at_once()
          [0.0, 1.0, 0.0]
        """
        _, begin, end = self._steady
        work = [e for e in self.events if e.within(begin, end)]
        changes = [(max(e.start, begin), 1) for e in work] + [(min(e.end, end), -1) for e in work]
        parts, working, last = [0.0] * (self.schedule.num_stages + 1), 0, begin
        for time, change in sorted([*changes, (end, 0)]):
            parts[working] += (time - last) / (end - begin)
            working, last = working + change, time
        return parts

    def order(self, k: int) -> list[Action]:
        """The actions of stage k in temporal order.

        Args:
          k: the stage.

        Returns:
          The actions.

        Raises:
          ValueError: no such stage.
        """
        return [action for event in self._own(k) for action in event.actions]

    def in_flight(self, k: int) -> int:
        """The maximum number of mini-batches forwarded but not yet applied in stage k.

        Args:
          k: the stage.

        Returns:
          The peak over the run; in a long enough run `Schedule.in_flight`.

        Raises:
          ValueError: no such stage.
        """
        return max(held.batches for held in self._held(k))

    def microbatches_in_flight(self, k: int) -> int:
        """The maximum number of micro-batches forwarded but not yet back-propagated in stage k.

        An undivided mini-batch counts as one.

        Args:
          k: the stage.

        Returns:
          The peak over the run.

        Raises:
          ValueError: no such stage.
        """
        return max(held.flights for held in self._held(k))

    def weight_versions(self, k: int) -> int:
        """The maximum number of weight versions stored in stage k, including the newest.

        Args:
          k: the stage.

        Returns:
          The peak over the run. During an update the old and new weights count as one.

        Raises:
          ValueError: no such stage.
        """
        return max(held.versions for held in self._held(k))

    def peak_bytes(self, k: int) -> float:
        """The peak size of the data stored in stage k.

        .. math::
            \\text{parameters} \\cdot (\\text{versions} + \\text{optimizer})
            + \\text{in flight} \\cdot (\\text{input} + \\text{residuals}) / M

        Residuals are stored only with ``gradient="stale"``. A batch in flight keeps the weight
        version of its forward alive unless ``gradient="recompute"``; `Schedule.versions` are always
        kept. Not counted: messages not yet consumed, gradients, temporary values of programs.

        Args:
          k: the stage.

        Returns:
          Bytes; sizes not given in `Costs` count as 0.

        Raises:
          ValueError: no such stage.
        """
        return max(
            bytes_of(held, self.costs, k, self.schedule, self.gradient) for held in self._held(k)
        )

    def sent_bytes(self, k: int) -> float:
        """Bytes sent between stages k and k+1 per mini-batch: `Costs.sent_bytes`."""
        return self.costs.sent_bytes(k, self.schedule)

    def chrome_trace(self, name: str | None = None, number: int = 0) -> dict[str, Any]:
        """The events as a trace for Perfetto or chrome://tracing, one row per stage.

        Args:
          name: title of the rows; None: the schedule's name.
          number: number of this timeline in a trace with several.

        Returns:
          JSON data; times in microseconds.
        """
        head = {"name": self.schedule.name if name is None else name}
        rows: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": number, "args": head}
        ]
        for k in range(self.schedule.num_stages):
            row = {"ph": "M", "pid": number, "tid": k}
            rows.append({"name": "thread_name", **row, "args": {"name": f"stage {k}"}})
            rows.append({"name": "thread_sort_index", **row, "args": {"sort_index": k}})
        for event in self.events:
            action = event.action
            micro = {} if action.micro is None else {"micro": action.micro}
            place = {"stage": action.stage, "device": event.device}
            rows.append(
                {
                    "name": event.label,
                    "cat": "fdg_jax",
                    "ph": "X",
                    "pid": number,
                    "tid": action.stage,
                    "ts": 1e6 * float(event.start),
                    "dur": 1e6 * float(event.end - event.start),
                    "args": {"batch": action.batch, **micro, **place},
                }
            )
        return {"traceEvents": rows, "displayTimeUnit": "ms"}

    @functools.cached_property
    def _by_stage(self) -> list[list[Event]]:
        rows: list[list[Event]] = [[] for _ in range(self.schedule.num_stages)]
        for event in self.events:  # a stage has one queue, so its events are in temporal order
            rows[event.action.stage].append(event)
        return rows

    def _own(self, k: int) -> list[Event]:
        if not 0 <= k < self.schedule.num_stages:
            last = self.schedule.num_stages - 1
            raise ValueError(f"k={k}: schedule {self.schedule.name} has stages 0 to {last}")
        return self._by_stage[k]

    @functools.cached_property
    def _steady(self) -> tuple[int, float, float]:
        """A number of batches that is a multiple of the period, with their begin and end times."""
        kinds = self.schedule.kind_of
        finished: dict[int, float] = {}
        entered = 0.0
        for event in self.events:
            for action in event.actions:
                if kinds[action.kind].in_flight == "closes":
                    finished[action.batch] = max(finished.get(action.batch, 0), event.end)
                elif kinds[action.kind].in_flight == "opens" and not action.stage:
                    entered = max(entered, 0 if action.micro else event.start)
        # After the last batch has entered, the pipeline drains.
        times = [finished[n] for n in sorted(finished) if finished[n] <= entered]
        times = times[self.schedule.start :]
        count, step = len(times), self.schedule.period
        if count <= step:
            raise ValueError(
                f"batches={len(finished)}: too few for a steady state of {self.schedule.name}; "
                "simulate or record more, or leave the number out"
            )
        times = times[min((count - 1) // 2, count - 1 - step) :]
        lengths = range(step, len(times), step)
        length = next((p for p in lengths if _periodic(times, p)), lengths[-1])
        return length, times[-1 - length], times[-1]

    def _held(self, k: int) -> list[Held]:
        return list(held(self.schedule, self.gradient, self.order(k)))


def _periodic(times: list[float], period: int) -> bool:
    """Whether all differences between times ``period`` places apart are equal."""
    pairs = list(zip(times[period:], times, strict=False))
    seconds = pairs[-1][0] - pairs[-1][1]
    return all(abs(later - earlier - seconds) <= 1e-9 * times[-1] for later, earlier in pairs)
