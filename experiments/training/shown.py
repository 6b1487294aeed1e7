"""What a run shows before and after its training: the schedule, the stages, the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fdg_jax as fdg
from experiments.common.screen import Screen
from experiments.training.setup import Setup
from fdg_jax.schedule import LEGEND


def introduce(screen: Screen, run: Setup, table: Sequence[dict[str, Any]]) -> None:
    """The schedule's grid and the stage table."""
    config, dataset = run.config, run.dataset
    screen.line(
        f"{config.method} of {config.model} on {dataset.name} "
        f"({len(dataset.train_labels):,} train, {len(dataset.test_labels):,} {run.split} images), "
        f"K = {len(run.stages)}, "
        f"{run.total_steps:,} steps of {config.batch_size} images"
    )
    screen.line()
    screen.line(f"{run.schedule}\n\n{LEGEND}\n")
    if run.times is not None:
        screen.line(f"partition: {run.times.note}")
    stage_table(screen, run.stages, table)


def stage_table(screen: Screen, stages: fdg.Partition, table: Sequence[dict[str, Any]]) -> None:
    """Where each stage is, what it holds, and how late its gradients are."""
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
    """The closing table."""
    split = run.split
    left_out = summary["left_out"]
    rows = [
        (f"{split} error", f"{100 * summary[f'{split}_error']:.2f} %"),
        (f"best {split} error", f"{100 * summary[f'best_{split}_error']:.2f} %"),
        ("training time", f"{summary['train_seconds']:.1f} s"),
        ("images per second", f"{summary['images_per_second']:,.0f}"),
        ("staleness per stage", ", ".join(map(str, summary["staleness"]))),
        *([("left out per stage", ", ".join(map(str, left_out)))] if any(left_out) else []),
        ("params sha256", summary["params_sha256"][:16] + "..."),
        ("results", run.config.workdir),
    ]
    screen.table("Result", ("", ""), rows)
