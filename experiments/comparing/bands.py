"""Aggregates of a series over seeds, and plots with bands."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.comparing import paper
from experiments.comparing.records import Record
from experiments.tasks import TASKS
from experiments.training import methods
from experiments.training.remedies import REMEDIES

# The colour-blind-safe colours of Okabe and Ito, and three more; methods most often compared have
# the most distinct ones.
COLOURS = {
    "backprop": "#000000",
    "fdg": "#D55E00",
    "ddg": "#0072B2",
    "fr": "#56B4E9",
    "dsp": "#009E73",
    "adl": "#CC79A7",
    "gpipe": "#E69F00",
    "one_f_one_b": "#B8A800",
    "pipedream": "#8C8C8C",
    "pipedream_2bw": "#7A4B2A",
    "data_parallel": "#5B3A8C",
}
MARKERS = "osD^vP*X<>h"
# Distance of names, as a fraction of the panel's height.
LABEL_GAP = 0.055
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))


def aggregate(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Mean, standard deviation and curve over the seeds of each method, K, remedy and beta."""
    groups: dict[tuple[bool, str, int, str, float], list[Record]] = {}
    for r in records:
        groups.setdefault((r.choosing, r.method, r.stages, r.remedy, r.beta), []).append(r)
    found = []
    order = list(methods.METHODS)
    for key in sorted(
        groups, key=lambda g: (g[0], order.index(g[1]), g[2], REMEDIES.index(g[3]), -g[4])
    ):
        group = sorted(groups[key], key=lambda r: r.seed)
        values, metric = [r.value for r in group], group[0].metric
        curve = []
        for points in zip(*(r.curve for r in group), strict=False):
            found_there = [p["value"] for p in points]
            curve.append(
                {
                    "epoch": points[0]["epoch"],
                    "seconds": statistics.fmean(p["seconds"] for p in points),
                    "mean": statistics.fmean(found_there),
                    "min": min(found_there),
                    "max": max(found_there),
                }
            )
        found.append(
            {
                **dict(zip(("choosing", "method", "stages", "remedy", "beta"), key, strict=True)),
                "split": group[0].split,
                "metric": metric,
                "seeds": [r.seed for r in group],
                "n": len(group),
                f"mean_{metric}": statistics.fmean(values),
                f"sd_{metric}": spread(values),
                f"median_{metric}": statistics.median(values),
                "median_seconds": statistics.median(r.seconds for r in group),
                "curve": curve,
            }
        )
    return found


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None for one value, or if a value is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)


def draw(groups: Sequence[dict[str, Any]], x: str, title: str) -> bytes:
    """A PNG of error or loss against ``x`` ("epoch" or "seconds"), one panel for each K.

    Backprop is in every panel. Lines are means, bands span minimum and maximum over the seeds;
    non-finite values are not drawn.
    """
    groups = [g for g in groups if all(math.isfinite(p["max"]) for p in g["curve"])]
    stages = sorted({g["stages"] for g in groups if g["method"] != "backprop"}) or [1]
    figure = Figure(figsize=(1 + 6.6 * len(stages), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    variants = sorted({(REMEDIES.index(g["remedy"]), -g["beta"]) for g in groups})
    for panel, k in zip(panels, stages, strict=True):
        shown = [g for g in groups if g["curve"] and g["stages"] in (k, 1)]
        for g in shown:
            at = [p[x] for p in g["curve"]]
            factor = paper.factor(g["metric"])
            low, mean, high = ([factor * p[n] for p in g["curve"]] for n in ("min", "mean", "max"))
            colour = COLOURS[g["method"]]
            panel.plot(
                at,
                mean,
                color=colour,
                linestyle=DASHES[
                    variants.index((REMEDIES.index(g["remedy"]), -g["beta"])) % len(DASHES)
                ],
                marker=MARKERS[list(COLOURS).index(g["method"])],
                linewidth=1.6,
                markersize=4,
            )
            panel.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        panel.set_title(f"K = {k}, and backprop", fontsize=11)
        panel.set_xlabel("epoch" if x == "epoch" else "training seconds (mean over the seeds)")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for g in groups[:1]:
        panels[0].set_ylabel(f"{g['split']} {paper.quantity(g['metric'], ' (%)')}")
    for panel, k in zip(panels, stages, strict=True):
        _label(panel, [g for g in groups if g["curve"] and g["stages"] in (k, 1)], x)
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _label(panel: Any, groups: Sequence[dict[str, Any]], x: str) -> None:
    """Writes names beside the panel, sorted by the last error and connected to their lines."""
    low, high = panel.get_ylim()
    ends = sorted(groups, key=lambda g: g["curve"][-1]["mean"])
    heights: list[float] = []
    for g in ends:
        height = (paper.factor(g["metric"]) * g["curve"][-1]["mean"] - low) / (high - low)
        heights.append(max([height, *(h + LABEL_GAP for h in heights[-1:])]))
    excess = max([0.0, *(h - 1 for h in heights[-1:])])
    for g, height in zip(ends, heights, strict=True):
        last, colour = g["curve"][-1], COLOURS[g["method"]]
        value = paper.factor(g["metric"]) * last["mean"]
        beta = f", beta {g['beta']:g}" if methods.METHODS[g["method"]].shrinks else ""
        tie = {"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6, "relpos": (0, 0.5)}
        panel.annotate(
            f"{paper.label(g)}{beta}: {value:.{paper.digits(g['metric'])}f}",
            (last[x], value),
            xytext=(1.05, height - excess),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            arrowprops=tie,
        )


def write(
    folder: pathlib.Path,
    settings: dict[str, Any],
    choice: dict[str, Any],
    records: Sequence[Record],
) -> None:
    """Writes results.json, table.md, compare_epochs.png and compare_seconds.png atomically."""
    groups = aggregate(records)
    machines: list[dict[str, Any]] = []
    for record in records:
        if record.environment not in machines:
            machines.append(record.environment)
    results = {
        "settings": settings,
        "machines": machines,
        "beta_choice": choice,
        "aggregates": groups,
        "runs": [_row(record, settings["program"]) for record in records],
    }
    files = {
        "results.json": (json.dumps(_finite(results), indent=2, allow_nan=False) + "\n").encode(),
        "table.md": paper.table(settings, choice, groups).encode(),
    }
    final = [g for g in groups if not g["choosing"]]
    common = settings["common"]
    title = f"{common['model']} on {common['dataset']}: mean and range over the seeds"
    for x in ("epoch", "seconds") if final else ():
        files[f"compare_{x.rstrip('s')}s.png"] = draw(final, x, title)
    for name, content in files.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)


def _row(record: Record, program: str) -> dict[str, Any]:
    """A run in results.json, with the names of summary.json."""
    metric = record.metric
    names = {"best": f"best_{metric}", "speed": f"{TASKS[program].unit}_per_second"}
    found = {n: v for n, v in dataclasses.asdict(record).items() if n != "environment"}
    found["curve"] = [
        {(metric if n == "value" else n): v for n, v in p.items()} for p in record.curve
    ]
    return {names.get(name, name): value for name, value in found.items()}


def _finite(value: Any) -> Any:
    """The value for JSON, with None for non-finite numbers."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
