"""Bar chart of a benchmark: milliseconds per step of each contender."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.benchmarking import tables

COLOURS = {"one device": "#8C8C8C", "FDG": "#D55E00", "others on several devices": "#56A0CE"}


def draw(results: dict[str, Any]) -> bytes:
    """A PNG of the medians with whiskers from minimum to maximum; ``results`` as in benchmark.json.

    Each bar is labelled with its time and its speedup over the baseline.
    """
    rows, base = results["contenders"], results["base"]
    figure = Figure(figsize=(9, 1.8 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    largest = max(row["seconds"]["max"] for row in rows)
    for y, row in enumerate(rows):
        low, middle, high = (1e3 * row["seconds"][name] for name in ("min", "median", "max"))
        axis.barh(y, middle, height=0.66, color=_colour(row))
        whiskers = [[middle - low], [high - middle]]
        axis.errorbar(middle, y, xerr=whiskers, color="black", capsize=3, linewidth=1)
        ratio = row["over"][base]["median"]
        text = f"{_digits(middle)} ms" + ("" if row["name"] == base else f"   {ratio:.2f} x")
        axis.annotate(
            text, (high, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    # Room for the text beside the longest bar.
    axis.set_xlim(0, 1.28e3 * largest)
    axis.set_xlabel(f"milliseconds a step (whiskers: all rounds); x: as fast as {base}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    handles = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    title = tables.describe(results)
    if not results["fair"]:
        title += "\n" + textwrap.fill(f"NOT A FAIR COMPARISON: {results['unfair'][0]}", 100)
    axis.set_title(title, loc="left", fontsize=10, color="black" if results["fair"] else "#B00020")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _colour(row: dict[str, Any]) -> str:
    if row["name"].startswith("fdg"):
        return COLOURS["FDG"]
    return COLOURS["one device" if row["devices"] == 1 else "others on several devices"]


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
