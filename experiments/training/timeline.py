"""The recorded timeline of a run, as a trace and a picture."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax

from experiments.common import gantt
from experiments.common.errors import UsageError
from experiments.common.screen import Screen
from experiments.common.workdir import Workdir
from experiments.training.setup import Setup
from fdg_jax.analysis.recorder import Recorder, expected
from fdg_jax.analysis.simulate import enough
from fdg_jax.analysis.timeline import Timeline

# Mini-batches in the picture; the trace has all.
DRAWN = 8
# The folder of JAX's profiler in a workdir.
PROFILE = "profile"


class Watch:
    """Records --timeline ticks of a run after its programs have been compiled, and traces the
    following --profile ticks with JAX's profiler.

    Args:
      run: the run.
      step: the first step of this process; a resumed run records again.

    Raises:
      UsageError: the run is too short, or has several processes.
    """

    def __init__(self, run: Setup, step: int) -> None:
        config, least = run.config, enough(run.schedule)
        self._run = run
        self._recorder: Recorder | None = None
        self._tracing = False
        # Twice the time until every program has run once.
        self._begin = step + least
        self._middle = self._begin + config.timeline + 1
        self._end = self._middle + config.profile
        if config.timeline + config.profile and jax.process_count() > 1:
            raise UsageError(
                f"--timeline={config.timeline} and --profile={config.profile}: the clocks of "
                f"{jax.process_count()} processes cannot be compared; watch a run of one process"
            )
        if step == 0 and config.timeline + config.profile and self._end > run.total_steps:
            raise UsageError(
                f"--timeline={config.timeline} and --profile={config.profile}: need "
                f"{self._end} steps, the first {least} to compile; the run has {run.total_steps}, "
                "so choose fewer ticks or train longer"
            )
        if step == 0 and 0 < config.timeline < least:
            raise UsageError(
                f"--timeline={config.timeline}: too short for a steady state of {config.method}; "
                f"choose {least} or more, or 0 for none"
            )

    def before(self, step: int) -> None:
        """Called before every step; waits only for JAX's profiler."""
        config = self._run.config
        if config.timeline and step == self._begin:
            self._recorder = Recorder(self._run.pipe, config.timeline)
        if config.profile and step == self._middle:
            jax.profiler.start_trace(pathlib.Path(config.workdir).expanduser() / PROFILE)
            self._tracing = True
        if self._tracing and step == self._end:
            self._stop_tracing()

    def write(self, out: Workdir, screen: Screen) -> None:
        """Writes timeline.json and timeline.png, if enough was recorded."""
        self._stop_tracing()
        if not self._run.config.timeline:
            return
        try:
            if self._recorder is None:
                raise ValueError("too few steps were left when the run went on")
            measured = self._recorder.timeline()
            simulated = expected(measured)
            numbers = figures(measured, simulated)
        except ValueError as error:
            screen.line(f"no timeline: {error}")
            return
        out.write_json("timeline.json", trace(measured, simulated, numbers))
        out.write_bytes("timeline.png", picture(measured, simulated, numbers))
        screen.line(f"timeline: {sentence(numbers['measured'])}")

    def _stop_tracing(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def figures(measured: Timeline, simulated: Timeline) -> dict[str, Any]:
    """The numbers shown with the picture.

    Raises:
      ValueError: the timelines are too short.
    """
    stages = range(measured.schedule.num_stages)
    found: dict[str, Any] = {"schedule": measured.schedule.name, "stages": len(stages)}
    for name, run in (("measured", measured), ("simulated", simulated)):
        found[name] = {
            "batches_per_second": run.throughput,
            "utilisation": [run.utilisation(k) for k in stages],
            "at_once": run.at_once(),
        }
    costs = measured.costs
    found["mean_seconds"] = {
        name: list(getattr(costs, name)) for name in ("forward", "backward", "update")
    }
    return found


def trace(measured: Timeline, simulated: Timeline, numbers: dict[str, Any]) -> dict[str, Any]:
    """Both as one trace for Perfetto or chrome://tracing, with the numbers."""
    made = measured.chrome_trace("measured", 0)
    made["traceEvents"] += simulated.chrome_trace("simulated", 1)["traceEvents"]
    return {**made, "otherData": numbers}


def picture(measured: Timeline, simulated: Timeline, numbers: dict[str, Any]) -> bytes:
    """A PNG of some ticks in the middle, measured above simulated."""
    batches = sorted({event.action.batch for event in measured.events})
    middle = batches[len(batches) // 2]
    rows = []
    for name, run in (("measured", measured), ("simulated", simulated)):
        # Both start with the same batch.
        begin = next(
            e.start
            for e in run.events
            if e.action.stage == 0 and "F" in e.label and e.action.batch >= middle
        )
        end = begin + DRAWN / measured.throughput
        shown = [
            dataclasses.replace(e, start=max(e.start, begin) - begin, end=min(e.end, end) - begin)
            for e in run.events
            if e.within(begin, end)
        ]
        title = f"{numbers['schedule']}, {name}: {sentence(numbers[name])}"
        rows.append((title, dataclasses.replace(run, events=shown)))
    return gantt.draw(rows, marked=middle + DRAWN // 2)


def sentence(numbers: dict[str, Any]) -> str:
    """Utilisation and overlap of one timeline as text."""
    use = ", ".join(f"{100 * part:.0f} %" for part in numbers["utilisation"])
    count = len(numbers["utilisation"])
    together = "" if count == 1 else f"; {count} at once {100 * numbers['at_once'][-1]:.0f} %"
    return f"stages busy {use} of the time{together}; {numbers['batches_per_second']:.3g} batches/s"


def read(text: str) -> dict[str, Any]:
    """The numbers in timeline.json.

    Raises:
      ValueError: it is not the file of a run.
    """
    value = json.loads(text)
    if not isinstance(value, dict) or "measured" not in value.get("otherData", {}):
        raise ValueError("it has no otherData.measured")
    numbers: dict[str, Any] = value["otherData"]
    return numbers
