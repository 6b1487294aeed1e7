"""Console output of a run before and after its training: schedule, stages, result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import fdg_jax as fdg
from experiments.common.screen import Screen
from experiments.training.setup import Setup
from experiments.training.task import Task
from fdg_jax.schedule import LEGEND


def introduce(screen: Screen, run: Setup, table: Sequence[dict[str, Any]]) -> None:
    """Prints the schedule's grid and the stage table."""
    config, task = run.config, run.task
    screen.line(
        f"{config.method} of {config.model} on {task.name} ({task.sizes()}), "
        f"K = {len(run.stages)}, "
        f"{run.total_steps:,} steps of {task.per_batch(config):,} {task.unit}"
    )
    screen.line()
    screen.line(f"{run.schedule}\n\n{LEGEND}\n")
    if run.times is not None:
        screen.line(f"partition: {run.times.note}")
    stage_table(screen, run.stages, table)


def number(metric: str, value: float | None) -> str:
    """A loss or an error as text.

    Example:
      >>> number("error", 0.125), number("loss", 2.5), number("loss", None)
      ('12.50 %', '2.5000', 'not finite')
    """
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{100 * value:.2f} %" if metric == "error" else f"{value:.4f}"


def evaluated_line(
    task: Task[Any], epoch: float, step: int, result: Mapping[str, float], seconds: float
) -> str:
    """A line with the results of an evaluation."""
    split, loss, error = task.split, result["loss"], 100 * result["error"]
    return (
        f"epoch {epoch:6.2f}  step {step:6d}  {split} loss {loss:.4f}  "
        f"{split} error {error:5.2f} %  {seconds:7.1f} s"
    )


def stage_table(screen: Screen, stages: fdg.Partition, table: Sequence[dict[str, Any]]) -> None:
    """Prints devices, layers, parameters and staleness of each stage."""
    total = sum(stages.costs)
    rows = []
    for row in table:
        share = f"{100 * row['cost'] / total:.0f} %" if total else "-"
        a, b = row["layers"]
        rows.append(
            (
                str(row["stage"]),
                ", ".join(row["devices"]),
                f"{a}-{b - 1}",
                f"{row['parameters']:,}",
                share,
                str(row["delay"]),
                str(row["staleness"]),
                str(row["in_flight"]),
                f"{row['shrink']:.3g}",
            )
        )
    heads = ("stage", "devices", "layers", "parameters", "cost", "delay", "staleness")
    title = f"Stages, balance {stages.balance:.2f} (mean cost over largest, in {stages.unit})"
    screen.table(title, (*heads, "in flight", "shrink"), rows)


def conclude(screen: Screen, run: Setup, summary: dict[str, Any]) -> None:
    """Prints the closing table."""
    task, left_out = run.task, summary["left_out"]
    result = f"{task.split}_{task.metric}"
    rows = [
        (name.replace("_", " "), number(task.metric, summary[name]))
        for name in (result, f"best_{result}")
    ]
    rows += [
        ("training time", f"{summary['train_seconds']:.1f} s"),
        (f"{task.unit} per second", f"{summary[f'{task.unit}_per_second']:,.0f}"),
        ("staleness per stage", ", ".join(map(str, summary["staleness"]))),
        *([("left out per stage", ", ".join(map(str, left_out)))] if any(left_out) else []),
        ("params sha256", summary["params_sha256"][:16] + "..."),
        ("results", run.config.workdir),
    ]
    screen.table("Result", ("", ""), rows)
