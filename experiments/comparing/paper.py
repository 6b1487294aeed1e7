"""Tables of a series with the paper's figures, and the selection of beta."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.comparing.overhead import steps_to
from experiments.comparing.records import Record
from experiments.training import methods
from experiments.training.config import Config

# Zhuang et al., arXiv 1906.09108: test error in percent, median of three. "fdg" is the figure with
# beta 1, "fdg*" that with the best beta (given with it).
PAPER: dict[tuple[str, str], dict[tuple[str, int], tuple[float, float | None]]] = {}


def _paper(dataset: str, model: str, **figures: Sequence[float | tuple[float, float]]) -> None:
    table = PAPER.setdefault((dataset, model), {})
    for name, values in figures.items():
        for k, value in enumerate(values, 1 if name == "backprop" else 2):
            method = "fdg*" if name == "best" else name
            table[method, k] = value if isinstance(value, tuple) else (value, None)


_paper("cifar10", "resnet20", backprop=[7.78], fdg=[7.92], best=[(7.23, 0.2)])
_paper(
    "cifar10",
    "resnet56",
    backprop=[6.19],
    # For K=2 the paper has 6.63 in one table and 6.60 in another.
    ddg=[6.63, 6.50, 6.61],
    fr=[6.07, 6.33, 6.48],
    fdg=[6.20, 6.20, 6.83],
    best=[(5.90, 0.5), (6.08, 0.5), (6.14, 0.5)],
)
for _dataset, _model, _backprop, _ddg, _fr, _fdg, _best in (
    ("cifar10", "resnet110", 5.79, 6.26, 5.76, 5.79, (5.73, 0.5)),
    ("cifar10", "resnet18", 4.87, 5.00, 4.80, 4.82, (4.79, 0.8)),
    ("cifar100", "resnet56", 27.68, 28.44, 28.39, 27.87, (27.49, 0.4)),
    ("cifar100", "resnet110", 25.82, 27.16, 26.31, 25.73, (25.43, 0.5)),
    ("cifar100", "resnet18", 22.35, 22.74, 22.88, 22.78, (22.18, 0.5)),
):
    _paper(_dataset, _model, backprop=[_backprop], ddg=[_ddg], fr=[_fr], fdg=[_fdg], best=[_best])
_paper("cifar10", "resnet1202", backprop=[5.53], fdg=[5.50], best=[(5.49, 0.7)])
_paper("cifar10", "wrn28_10", backprop=[4.01], fdg=[4.13], best=[(3.85, 0.7)])
_paper("cifar100", "wrn28_10", backprop=[19.6], fdg=[20.28], best=[(19.08, 0.6)])


def key(method: str, stages: int, remedy: str) -> str:
    """The name of a combination for which beta is selected."""
    return f"{method}_k{stages}" + (f"_{remedy}" if remedy != "none" else "")


def label(group: dict[str, Any]) -> str:
    """A method with its remedy."""
    return group["method"] + (f" + {group['remedy']}" if group["remedy"] != "none" else "")


def factor(metric: str) -> float:
    """The factor for display: errors are in percent, losses unscaled."""
    return 100.0 if metric == "error" else 1.0


def digits(metric: str) -> int:
    """The number of decimals of a metric."""
    return 2 if metric == "error" else 3


def quantity(metric: str, percent: str) -> str:
    """A metric's name, with its unit if it has one."""
    return metric + (percent if metric == "error" else "")


def choose(wanted: Sequence[Config], records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """The beta with the best mean, for every method, K and remedy with complete selection runs."""
    found = {}
    keys = [key(c.method, c.num_stages, c.remedy) for c in wanted]
    for name in dict.fromkeys(keys):
        configs = [c for c, own in zip(wanted, keys, strict=True) if own == name]
        errors: dict[float, list[float]] = {c.beta: [] for c in configs}
        for record in records:
            if record.choosing and key(record.method, record.stages, record.remedy) == name:
                errors[record.beta].append(record.value)
        if sum(map(len, errors.values())) < len(configs):
            continue
        means = {beta: statistics.fmean(values) for beta, values in errors.items()}
        found[name] = {
            # Ties are broken by the largest beta.
            "best": min(means, key=lambda beta: (means[beta], -beta)),
            "validation_size": configs[0].validation_size,
            "seeds": sorted({c.seed for c in configs}),
            "mean_validation_error": {f"{beta:g}": mean for beta, mean in means.items()},
        }
    return found


def figure(dataset: str, model: str, method: str, k: int, beta: float) -> str:
    """The paper's error for the same network, method and K; its best if beta is below 1."""
    kind, _, name = dataset.partition(":")
    same = kind if kind.startswith("cifar") else name if kind == "tfds" else ""
    figures = PAPER.get((same if same in ("cifar10", "cifar100") else "cifar10", model), {})
    shrunk = method == "fdg" and beta < 1
    value, at = figures.get(("fdg*" if shrunk else method, k), (None, None))
    if value is None:
        return ""
    notes = [f"best of its betas, {at:g}"] if at else []
    # The figure is for CIFAR-10, unlike the runs.
    notes += [] if same in ("cifar10", "cifar100") else ["another data set: CIFAR-10"]
    return f"{value:.2f}" + (f" ({'; '.join(notes)})" if notes else "")


def table(
    settings: dict[str, Any], choice: dict[str, Any], groups: Sequence[dict[str, Any]]
) -> str:
    """The content of table.md."""
    common = settings["common"]
    final = [g for g in groups if not g["choosing"]]
    chosen = {(key, entry["best"]) for key, entry in choice.items()}
    length = f"{common['steps']} steps" if common["steps"] else f"{common['epochs']} epochs"
    size = f", {common['train_size']:,} train images" if common.get("train_size") else ""
    text = [f"# {common['model']} on {common['dataset']}{size}, {length}", ""]
    if final:
        split, metric = final[0]["split"], final[0]["metric"]
        text += [
            f"{split.capitalize()} {quantity(metric, ' in percent')} after the last step, mean ± "
            "sample standard deviation over n seeds; median of the training seconds (evaluation "
            "not counted).",
            "",
        ]
        text += _grid(final, common, chosen, f"{split} {quantity(metric, ', %')}", with_paper=True)
    if settings.get("reach") and final:
        text += ["", f"## Training seconds until the mean {final[0]['metric']} is reached", ""]
        text += _seconds(final, settings["reach"])
    if choice:
        text += ["", "\\* chosen on the validation split, for each method and K by itself."]
    validated = [g for g in groups if g["choosing"]]
    if validated:
        held = settings["choose_validation_size"]
        text += ["", f"## Choice of beta: {held:,} images held out of train", ""]
        text += _grid(validated, common, chosen, "validation error, %", with_paper=False)
    if not any(model == common["model"] for _, model in PAPER):
        text += ["", f"The paper has no figures for {common['model']}."]
    return "\n".join(text) + "\n"


def _seconds(groups: Sequence[dict[str, Any]], values: Sequence[float]) -> list[str]:
    """One row per group; seconds are interpolated linearly between evaluations."""
    unit = " %" if groups[0]["metric"] == "error" else ""
    lines = [
        "| method | K | beta | " + " | ".join(f"{value:g}{unit}" for value in values) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(values),
    ]
    for g in groups:
        points = [(p["seconds"], factor(g["metric"]) * p["mean"]) for p in g["curve"]]
        beta = f"{g['beta']:g}" if methods.METHODS[g["method"]].shrinks else ""
        times = [steps_to(points, value) for value in values]
        cells = [f"{t:.0f}" if math.isfinite(t) else "not reached" for t in times]
        lines.append(f"| {label(g)} | {g['stages']} | {beta} | {' | '.join(cells)} |")
    return lines


def _grid(
    groups: Sequence[dict[str, Any]],
    common: dict[str, Any],
    chosen: set[tuple[str, float]],
    measured: str,
    *,
    with_paper: bool,
) -> list[str]:
    """A table by method and beta, with K columns each for error, seconds and the paper's figure."""
    stages = sorted({g["stages"] for g in groups})
    rows: dict[tuple[str, str, float], dict[int, dict[str, Any]]] = {}
    for g in groups:
        rows.setdefault((g["method"], label(g), g["beta"]), {})[g["stages"]] = g
    columns: list[list[str]] = [["method", *(name for _, name, _ in rows)]]
    shrinks = [methods.METHODS[m].shrinks for m, _, _ in rows]
    columns.append(
        ["beta", *(f"{b:g}" if s else "" for (_, _, b), s in zip(rows, shrinks, strict=True))]
    )
    for k in stages:
        columns.append(
            [f"{measured}, K={k}", *(_number(row.get(k), chosen) for row in rows.values())]
        )
    for k in stages:
        times = [f"{row[k]['median_seconds']:.1f}" if k in row else "" for row in rows.values()]
        columns.append([f"seconds, K={k}", *times])
    for k in stages if with_paper and not common["validation_size"] else []:
        figures = [
            figure(common["dataset"], common["model"], name, k, b) if k in row else ""
            for (_, name, b), row in rows.items()
        ]
        if any(figures):
            columns.append([f"paper, %, K={k}", *figures])
    lines = ["| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True)]
    return [lines[0], "|" + " --- |" * 2 + " ---: |" * (len(columns) - 2), *lines[1:]]


def _number(group: dict[str, Any] | None, chosen: set[tuple[str, float]]) -> str:
    if group is None:
        return ""
    metric = group["metric"]
    mean, sd = (group[f"{name}_{metric}"] for name in ("mean", "sd"))
    if not math.isfinite(mean):
        return "not finite"
    times, behind = factor(metric), digits(metric)
    spread = "" if sd is None else f" ± {times * sd:.{behind}f}"
    name = key(group["method"], group["stages"], group["remedy"])
    mark = " \\*" if (name, group["beta"]) in chosen else ""
    return f"{times * mean:.{behind}f}{spread} (n={group['n']}){mark}"
