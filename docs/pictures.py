"""Draws the pictures of the pages from the simulator: python -m docs.pictures"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import sys
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import fdg_jax as fdg
from experiments.common import gantt
from fdg_jax.analysis import Costs, Timeline
from fdg_jax.analysis.simulate import simulate

FOLDER = pathlib.Path(__file__).parent / "pictures"
RULES = ("stale", "recompute_stale", "recompute", "reconstruct")
SCHEDULES = {"back-propagation": "backprop", "DDG": "ddg", "FDG": "fdg"}
# The mini-batch with which the picture of the schedules begins, and how much of each it shows.
FIRST, SECONDS = 6, 18.0
SIZES: dict[str, Any] = {
    "input_bytes": [2] * 4,
    "residual_bytes": [30] * 4,
    "parameter_bytes": [10] * 4,
}


def schedules() -> bytes:
    """Timelines of three stages in steady state."""
    costs, rows = Costs(forward=[1] * 3, backward=[2] * 3), []
    for title, name in SCHEDULES.items():
        run = simulate(fdg.schedule.create(name, 3), costs)
        busy = ", ".join(f"{100 * run.utilisation(k):.0f}" for k in range(3))
        about = f"{title}: speedup {run.speedup:.0f}, utilisation {busy} %"
        rows.append((about, _window(run, FIRST, SECONDS)))
    return gantt.draw(rows, marked=FIRST)


def _window(run: Timeline, batch: int, seconds: float) -> Timeline:
    """The part of a run that begins with a mini-batch's forward in stage 0."""
    (begin,) = (e.start for e in run.events if str(e.action) == f"F{batch}@0")
    events = [
        dataclasses.replace(
            event,
            start=max(event.start - begin, 0.0),
            end=min(event.end - begin, seconds),
        )
        for event in run.events
        if event.within(begin, begin + seconds) or begin < event.end <= begin + seconds
    ]
    return dataclasses.replace(run, events=events)


def in_flight() -> bytes:
    """Mini-batches in flight in four stages."""
    figure, axis = _figure()
    _bars(
        axis,
        {
            title: [fdg.schedule.create(name, 4).in_flight(k) for k in range(4)]
            for title, name in SCHEDULES.items()
        },
    )
    axis.set_ylabel("mini-batches in flight")
    return _png(figure)


def memory() -> bytes:
    """Bytes held in four stages, by choice of gradient."""
    costs = Costs(forward=[1] * 4, backward=[2] * 4, optimizer=1, **SIZES)
    runs = {g: simulate(fdg.schedule.fdg(4), costs, gradient=g) for g in RULES}
    figure, axis = _figure()
    _bars(axis, {name: [run.peak_bytes(k) for k in range(4)] for name, run in runs.items()})
    axis.set_ylabel("MB held by FDG")
    note = "a stage: 10 MB of weights, as much momentum, 2 MB of input, 30 MB of residuals"
    axis.set_title(note, loc="left", fontsize=9)
    return _png(figure)


def methods() -> bytes:
    """Speed, staleness and bytes of every method that cuts the network, in four stages."""
    names = [name for name, method in fdg.methods.METHODS.items() if not method.one_stage]
    found = sorted(((*_measure(name), name) for name in names), key=lambda row: row[1:3])
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    titles = ("speedup over backprop", "staleness of stage 0, updates", "MB held by all stages")
    panels = figure.subplots(1, len(titles), sharey=True)
    for i, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        bars = panel.barh(range(len(found)), [row[i] for row in found], 0.7, color=f"C{i}")
        panel.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
        panel.margins(x=0.15)
        panel.set_title(title, loc="left", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(found)), [row[-1] for row in found])
    panels[0].invert_yaxis()
    return _png(figure)


def _measure(name: str) -> tuple[float, int, float]:
    """Speedup, largest staleness of stage 0 and bytes of a method."""
    made = fdg.methods.create(name, 4)
    # Where inputs are reconstructed, only the stem, in stage 0, has no inverse and keeps them.
    costs = Costs(forward=[1] * 4, backward=[2] * 4, optimizer=1, kept_bytes=[2, 0, 0, 0], **SIZES)
    run = simulate(made["schedule"], costs, gradient=made["gradient"])
    held = sum(run.peak_bytes(k) for k in range(4))
    return run.speedup, made["schedule"].staleness(0), held


PICTURES = {
    "schedules": schedules,
    "in_flight": in_flight,
    "memory": memory,
    "methods": methods,
}


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _bars(axis: Axes, groups: dict[str, list[float]]) -> None:
    """One group of bars a stage."""
    step = 0.81 / len(groups)
    for i, (label, values) in enumerate(groups.items()):
        places = np.arange(len(values)) + step * (i - (len(groups) - 1) / 2)
        bars = axis.bar(places, values, step - 0.02, label=label)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set_xticks(range(4), [f"stage {k}" for k in range(4)])
    axis.legend(frameon=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def main(folder: pathlib.Path = FOLDER) -> None:
    """Writes all of them.

    Args:
      folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.png").write_bytes(draw())


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
