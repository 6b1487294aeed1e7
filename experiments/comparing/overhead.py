"""Additional steps of a method to reach the same loss: numbers, table and picture."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.common.errors import UsageError
from experiments.comparing.study import Row, Study

Curve = Sequence[tuple[float, float]]  # (step, value) of every evaluation

DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))
COLOURS = (
    *("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"),
    *("#56B4E9", "#7A4B2A", "#6A3D9A", "#808000", "#888888"),
)
# More rows than this have their legend below the panels.
MOST_INSIDE = 8


def curve(metrics: Sequence[Mapping[str, Any]], metric: str) -> Curve:
    """Loss or error of every evaluation (not of training); infinity if not finite."""
    values = ((m["step"], m[metric]) for m in metrics if m["split"] != "train")
    return [(step, math.inf if value is None else value) for step, value in values]


def value_at(points: Curve, step: float) -> float:
    """The value at a step, by linear interpolation.

    Example:
      >>> value_at([(10, 4.0), (20, 2.0)], 15)
      3.0
    """
    for (a, low), (b, high) in itertools.pairwise(points):
        if a <= step <= b:
            return high if step == b else low + (high - low) * (step - a) / (b - a)
    return points[0][1] if step < points[0][0] else points[-1][1]


def steps_to(points: Curve, target: float) -> float:
    """The first step at which a curve reaches the target; infinity if never.

    Example:
      >>> steps_to([(10, 4.0), (20, 2.0)], 3.0), steps_to([(10, 4.0)], 3.0)
      (15.0, inf)
    """
    if points[0][1] <= target:
        return float(points[0][0])
    for (a, high), (b, low) in itertools.pairwise(points):
        if low <= target:
            return b if math.isinf(high) else a + (b - a) * (high - target) / (high - low)
    return math.inf


def rows(
    study: Study, found: Mapping[tuple[str, int], Mapping[str, Any]], fraction: float
) -> list[dict[str, Any]]:
    """The results of every row: last value, gap and overhead against its baseline, by seed.

    Args:
      study: the rows and their baselines.
      found: results of each finished run, by row and seed.
      fraction: fraction of the baseline's steps at which its value is the target.

    Returns:
      One dict per row with a finished run. "overhead" of each seed is the number of steps to the
      target relative to the baseline of the same seed; None if it was not reached.

    Raises:
      UsageError: the target lies before the baseline's first evaluation.
    """
    table = []
    for row in study.rows:
        seeds = [seed for seed in study.seeds if (row.name, seed) in found]
        if not seeds:
            continue
        curves = {s: curve(found[row.name, s]["metrics"], study.metric) for s in seeds}
        gaps, overheads = [], []
        for s in seeds:
            base = found.get((row.baseline, s))
            if base is None:
                continue
            against = curve(base["metrics"], study.metric)
            gaps.append(curves[s][-1][1] - against[-1][1])
            share = fraction * against[-1][0]
            if share < against[0][0]:
                raise UsageError(
                    f"--fraction={fraction:g}: of the {against[-1][0]} steps of {row.baseline!r} "
                    f"lies before its first evaluation, after {against[0][0]}; choose more"
                )
            ratio = steps_to(curves[s], value_at(against, share)) / share
            overheads.append(ratio if math.isfinite(ratio) else None)
        first = found[row.name, seeds[0]]
        table.append(
            {
                "name": row.name,
                "series": row.series,
                "baseline": row.baseline,
                "stages": first["summary"]["stages"],
                "staleness": first["summary"]["staleness"],
                "seeds": seeds,
                "last": [finite(curves[s][-1][1]) for s in seeds],
                "gap": [finite(gap) for gap in gaps],
                "overhead": overheads,
                "params_sha256": [found[row.name, s]["summary"]["params_sha256"] for s in seeds],
                "train_seconds": [found[row.name, s]["summary"]["train_seconds"] for s in seeds],
                "curves": [[(step, finite(v)) for step, v in curves[s]] for s in seeds],
            }
        )
    return table


def finite(value: float) -> float | None:
    """The value for JSON; None if not finite."""
    return value if math.isfinite(value) else None


def spread(values: Sequence[float | None], digits: int, factor: float = 1.0) -> str:
    """Mean ± sample standard deviation."""
    scaled = [factor * v for v in values if v is not None]
    if len(scaled) < len(values):
        return "not finite"
    text = f"{statistics.fmean(scaled):.{digits}f}"
    return f"{text} ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else text


def overhead_text(values: Sequence[float | None]) -> str:
    """The overheads of the seeds, and the number of seeds that did not reach the target."""
    reached = [v for v in values if v is not None]
    missed = len(values) - len(reached)
    if not values:
        return ""
    if not reached:
        return "not reached"
    return spread(reached, 2) + (f" ({missed} of {len(values)} not reached)" if missed else "")


def table(study: Study, found: Sequence[Mapping[str, Any]], fraction: float) -> str:
    """The content of table.md."""
    percent = study.metric == "error"
    factor, digits = (100.0, 2) if percent else (1.0, 3)
    unit = "error, %" if percent else "loss"
    lines = [
        f"# {study.title}",
        "",
        f"Validation or test {unit} after the last step and its gap to the baseline, mean ± sample "
        "standard deviation over n seeds. Overhead: steps to the value that the baseline has after "
        f"{fraction:g} of its steps, over these steps.",
        "",
        f"| row | K | staleness | n | {unit} | gap | overhead |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        own = row["name"] == row["baseline"]
        gap = "" if own or not row["gap"] else spread(row["gap"], digits, factor)
        cells = [
            row["name"],
            str(row["stages"]),
            ", ".join(f"{s:g}" for s in row["staleness"]),
            str(len(row["seeds"])),
            spread(row["last"], digits, factor),
            gap,
            "" if own else overhead_text(row["overhead"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(study: Study, found: Sequence[Mapping[str, Any]], fraction: float) -> bytes:
    """A PNG of the curves, and of the overhead over K with a line per series.

    Curves are means over the seeds, with bands from minimum to maximum.
    """
    factor = 100.0 if study.metric == "error" else 1.0
    many = len(found) > MOST_INSIDE
    figure = Figure(figsize=(13, 6.8 if many else 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    # A series has one colour in both panels, its rows one dash pattern per K.
    series = list(dict.fromkeys(row["series"] for row in found))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(series)}
    for row in found:
        if any(v is None for points in row["curves"] for _, v in points):
            continue  # non-finite values have no line
        colour = colours[row["series"]]
        steps = [step for step, _ in row["curves"][0]]
        values = [[factor * v for _, v in points] for points in row["curves"]]
        together = list(zip(*values, strict=True))
        others = [r["stages"] for r in found if r["series"] == row["series"]]
        last = f"{factor * statistics.fmean(row['last']):.{2 if factor > 1 else 3}f}"
        left.plot(
            steps,
            [statistics.fmean(v) for v in together],
            color=colour,
            linestyle=DASHES[sorted(others).index(row["stages"]) % len(DASHES)],
            linewidth=1.6,
            label=f"{row['name']}: {last}",
        )
        left.fill_between(
            steps,
            *map(list, zip(*((min(v), max(v)) for v in together), strict=True)),
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    left.set_xlabel("step")
    left.set_ylabel("error (%)" if factor > 1 else "loss")
    if many:
        handles = left.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower left", ncols=5, fontsize=8, frameon=False)
    else:
        left.legend(fontsize=8, frameon=False)
    compared = [row for row in found if row["name"] != row["baseline"] and row["overhead"]]
    for name in series:
        own = sorted((r for r in compared if r["series"] == name), key=lambda r: r["stages"])
        if not own:
            continue
        colour = colours[name]
        reached = [
            (r["stages"], [v for v in r["overhead"] if v is not None])
            for r in own
            if any(v is not None for v in r["overhead"])
        ]
        total = sum(len(r["overhead"]) for r in own)
        missed = total - sum(len(values) for _, values in reached)
        right.plot(
            [k for k, _ in reached],
            [statistics.fmean(v) for _, v in reached],
            color=colour,
            marker="o",
            markersize=5,
            linewidth=1.6,
            label=name if missed == 0 else f"{name}: {missed} of {total} runs not reached",
        )
        for k, values in reached:
            right.vlines(k, min(values), max(values), color=colour, linewidth=1)
    right.axhline(1, color="#000000", linewidth=0.8, linestyle="dashed")
    right.set_xticks([1, *sorted({row["stages"] for row in compared})])
    right.set_xlabel("K")
    right.set_ylabel(f"steps to the baseline's value after {fraction:g} of its steps, relative")
    if compared:
        right.legend(fontsize=8, frameon=False, loc="upper left")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(study.title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def describe(row: Row, seed: int) -> str:
    """A run as text for the console."""
    return f"{row.name}  seed={seed}"
