"""accelerator.png: time of a step by K, compiled and dispatched, relative to back-propagation."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.accelerating.tables import Rows, networks, ratio

COLOURS = {"compiled": "#D55E00", "dispatched": "#0072B2"}
STYLES = {"float32": "-", "bfloat16": "--"}
COLUMNS = 3


def series(rows: Rows, network: str, dtype: str, how: str) -> list[tuple[int, float]]:
    """Points (K, time relative to backprop); the engine with K = 1 is the first of both lines."""
    base = rows.get(f"times/{network}/{dtype}/backprop")
    found = []
    for name, row in rows.items():
        if not name.startswith(f"times/{network}/{dtype}/"):
            continue
        loop = name.rsplit("/", 1)[1]
        match = re.fullmatch(r"one_device_k(\d+)(_dispatched)?", loop)
        if match and (how == "dispatched") == bool(match[2]):
            stages = int(match[1])
        elif loop == "engine_k1":
            stages = 1
        else:
            continue
        value = ratio(row, base)
        if value is not None:
            found.append((stages, value))
    return sorted(found)


def draw(machine: Mapping[str, Any], rows: Rows, *, rehearsed: bool = False) -> bytes:
    """A PNG with a panel per network; ``rehearsed``: the title says that it is meaningless."""
    names = networks(rows)
    columns = min(max(len(names), 1), COLUMNS)
    lines = math.ceil(max(len(names), 1) / columns)
    figure = Figure(figsize=(1.0 + 3.6 * columns, 1.2 + 2.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for i, axis in enumerate(panels.flat):
        if i < len(names):
            handles |= _panel(axis, rows, names[i])
        else:
            axis.set_axis_off()
    if not names:
        panels.flat[0].text(0.5, 0.5, "nothing timed yet", ha="center", va="center")
    title = f"All stages on one device: {machine['device_kind']}"
    if rehearsed:
        title += ", A REHEARSAL: no figure says anything"
    figure.suptitle(title, fontsize=11)
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _panel(axis: Axes, rows: Rows, network: str) -> dict[str, Any]:
    """Draws a network; returns the handles of its lines by label."""
    handles: dict[str, Any] = {}
    ticks, highest = {1}, 1.0
    for dtype, style in STYLES.items():
        for how, colour in COLOURS.items():
            points = series(rows, network, dtype, how)
            if not points:
                continue
            ticks |= {stages for stages, _ in points}
            highest = max(highest, *(value for _, value in points))
            (line,) = axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", ms=4)
            handles[f"{how}, {dtype}"] = line
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(0, 1.1 * highest)
    axis.set_title(network, loc="left", fontsize=10)
    axis.set_xlabel("stages K")
    axis.set_ylabel("time a step / backprop")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    return handles
