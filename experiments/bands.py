"""The runs of a series on disk, and what they show together: aggregates, plots with bands."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import methods, paper
from experiments.config import FREE, Config
from experiments.errors import UsageError
from experiments.remedies import REMEDIES

# Okabe and Ito's colours, told apart by the colour-blind, and three more; what is most often
# compared has the most different ones.
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
# Between names, as a part of the panel's height.
LABEL_GAP = 0.055
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run: its numbers, its evaluations, and what it was run on."""

    folder: str
    method: str
    stages: int
    remedy: str
    beta: float
    seed: int
    split: str
    error: float
    best_error: float
    loss: float | None
    seconds: float
    images_per_second: float
    steps: int
    params_sha256: str
    curve: list[dict[str, float]]
    environment: dict[str, Any]

    @classmethod
    def read(
        cls,
        folder: str,
        config: dict[str, Any],
        summary: dict[str, Any],
        metrics: Sequence[dict[str, Any]],
    ) -> Record:
        """From the contents of a run's files."""
        split = "test" if "test_error" in summary else "validation"
        points = [m for m in metrics if m["split"] == split]
        places = ("versions", "device_kind", "machine", "cores", "devices")
        return cls(
            folder,
            config["method"],
            config["num_stages"],
            config.get("remedy", "none"),  # a run may be older than the flag
            config["beta"],
            config["seed"],
            split,
            summary[f"{split}_error"],
            summary[f"best_{split}_error"],
            summary[f"{split}_loss"],
            summary["train_seconds"],
            summary["images_per_second"],
            summary["steps"],
            summary["params_sha256"],
            [{name: m[name] for name in ("epoch", "seconds", "error")} for m in points],
            {name: config.get(name) for name in places},
        )

    @property
    def choosing(self) -> bool:
        """Whether the run served the choice of beta."""
        return self.folder.startswith("choose_")


def finished(config: Config) -> Record | None:
    """The run in ``config.workdir``, or None where it did not come to its end.

    Raises:
      UsageError: the run there has other settings.
    """
    folder = pathlib.Path(config.workdir)
    try:
        there = json.loads((folder / "config.json").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{folder}: cannot be read ({error}); delete it") from error
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for name, value in json.loads(json.dumps(dataclasses.asdict(config))).items():
        # A run that is older than a setting had its default.
        other = there.get(name, json.loads(json.dumps(defaults[name], default=str)))
        if name not in FREE and other != value:
            raise UsageError(
                f"{folder}: was run with --{name}={other}, not --{name}={value}; name another "
                "--workdir, give the same settings, or run it anew with --overwrite"
            )
    return Record.read(folder.name, there, summary, [json.loads(line) for line in lines])


def arguments(config: Config, *, overwrite: bool) -> list[str]:
    """The command that trains ``config`` in a process of its own: K decides on the devices."""
    found = [sys.executable, "-m", "experiments.cifar"]
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, tuple):
            value = ",".join(repr(v) for v in value)
        if value is not None and name != "overwrite":
            found.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return [*found, "--overwrite"] if overwrite else found


def train(command_line: list[str]) -> tuple[int, str]:
    """Exit status and stderr of a run."""
    done = subprocess.run(
        command_line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, done.stderr


def describe(config: Config) -> str:
    """A run, for one line on screen."""
    beta = f"  beta={config.beta:g}" if methods.METHODS[config.method].shrinks else ""
    held = "  (choosing beta)" if pathlib.Path(config.workdir).name.startswith("choose_") else ""
    remedy = f"  remedy={config.remedy}" if config.remedy != "none" else ""
    return f"{config.method}  K={config.num_stages}{remedy}{beta}  seed={config.seed}{held}"


def aggregate(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Over the seeds of each method, K, remedy and beta: mean, standard deviation, curve."""
    groups: dict[tuple[bool, str, int, str, float], list[Record]] = {}
    for r in records:
        groups.setdefault((r.choosing, r.method, r.stages, r.remedy, r.beta), []).append(r)
    found = []
    order = list(methods.METHODS)
    for key in sorted(
        groups, key=lambda g: (g[0], order.index(g[1]), g[2], REMEDIES.index(g[3]), -g[4])
    ):
        group = sorted(groups[key], key=lambda r: r.seed)
        errors = [r.error for r in group]
        curve = []
        for points in zip(*(r.curve for r in group), strict=False):
            values = [p["error"] for p in points]
            curve.append(
                {
                    "epoch": points[0]["epoch"],
                    "seconds": statistics.fmean(p["seconds"] for p in points),
                    "mean": statistics.fmean(values),
                    "min": min(values),
                    "max": max(values),
                }
            )
        found.append(
            {
                **dict(zip(("choosing", "method", "stages", "remedy", "beta"), key, strict=True)),
                "split": group[0].split,
                "seeds": [r.seed for r in group],
                "n": len(group),
                "mean_error": statistics.fmean(errors),
                "sd_error": statistics.stdev(errors) if len(errors) > 1 else None,
                "median_error": statistics.median(errors),
                "median_seconds": statistics.median(r.seconds for r in group),
                "curve": curve,
            }
        )
    return found


def draw(groups: Sequence[dict[str, Any]], x: str, title: str) -> bytes:
    """A PNG of error against ``x`` ("epoch" or "seconds"), one panel for each K.

    Backprop stands in every panel. Lines are means, bands the least and largest of the seeds.
    """
    stages = sorted({g["stages"] for g in groups if g["method"] != "backprop"}) or [1]
    figure = Figure(figsize=(1 + 6.6 * len(stages), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    variants = sorted({(REMEDIES.index(g["remedy"]), -g["beta"]) for g in groups})
    for panel, k in zip(panels, stages, strict=True):
        shown = [g for g in groups if g["curve"] and g["stages"] in (k, 1)]
        for g in shown:
            at = [p[x] for p in g["curve"]]
            low, mean, high = ([100 * p[n] for p in g["curve"]] for n in ("min", "mean", "max"))
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
    panels[0].set_ylabel(f"{groups[0]['split']} error (%)")
    for panel, k in zip(panels, stages, strict=True):
        _label(panel, [g for g in groups if g["curve"] and g["stages"] in (k, 1)], x)
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _label(panel: Any, groups: Sequence[dict[str, Any]], x: str) -> None:
    """Names beside the panel, from the largest last error to the least, each tied to its line."""
    low, high = panel.get_ylim()
    ends = sorted(groups, key=lambda g: g["curve"][-1]["mean"])
    heights: list[float] = []
    for g in ends:
        height = (100 * g["curve"][-1]["mean"] - low) / (high - low)
        heights.append(max([height, *(h + LABEL_GAP for h in heights[-1:])]))
    excess = max([0.0, *(h - 1 for h in heights[-1:])])
    for g, height in zip(ends, heights, strict=True):
        last, colour = g["curve"][-1], COLOURS[g["method"]]
        beta = f", beta {g['beta']:g}" if methods.METHODS[g["method"]].shrinks else ""
        tie = {"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6, "relpos": (0, 0.5)}
        panel.annotate(
            f"{paper.label(g)}{beta}: {100 * last['mean']:.2f}",
            (last[x], 100 * last["mean"]),
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
    """results.json, table.md, compare_epochs.png and compare_seconds.png, each whole."""
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
        "runs": [
            {n: v for n, v in dataclasses.asdict(r).items() if n != "environment"} for r in records
        ],
    }
    files = {
        "results.json": (json.dumps(results, indent=2, allow_nan=False) + "\n").encode(),
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
