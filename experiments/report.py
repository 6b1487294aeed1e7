"""Writes a report of one or several runs: settings, stages, curves, speed, timelines.

    python -m experiments.report runs/a runs/b --output=report.html

Accepts workdirs of finished, stopped or active runs of experiments.cifar and experiments.lm. The
page is a single file and needs no network. The first run is the baseline of the comparison.
Utilisation and timelines need runs with --timeline.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.common import command
from experiments.common.errors import UsageError
from experiments.common.workdir import local_path
from experiments.reporting import page, runs
from experiments.reporting.runs import Run
from experiments.training.shown import number

FLAGS = flags.FLAGS
# Entries of config.json that are not settings and are shown elsewhere on the page.
DERIVED = {"stages", "versions", "layer_costs", "devices", "device_kind", "machine", "cores"}
DERIVED |= {"experiment", "cuts", "cost_unit", "balance", "total_steps"}


def define_flags() -> None:
    flags.DEFINE_string("output", "report.html", "Output file, ending in .html.")


def comparison(shown: Sequence[Run]) -> str:
    """The table of all runs; its swatches are the legend of the plots."""
    task = shown[0].task
    heads = ["run", "method", "K", task.metric, "best", "time", f"{task.unit}/s", "x the first"]
    heads += ["staleness", "stages busy", "all at once", "remedy", "beta", "seed", "state"]
    first = shown[0].speed
    rows = []
    for run in shown:
        results, speed, busy = run.results, run.speed, run.figures
        measured = busy["measured"] if busy else None
        rows.append(
            [
                run.name,
                run.config["method"],
                f"{len(run.config['stages'])}",
                *([number(task.metric, value) for value in results] if results else ["-", "-"]),
                duration(run.seconds),
                "-" if speed is None else f"{speed:,.0f}",
                "-" if speed is None or not first else f"{speed / first:.2f}",
                ", ".join(map(str, run.staleness)),
                percent(measured["utilisation"]) if measured else "-",
                percent(measured["at_once"][-1:]) if measured else "-",
                run.config.get("remedy", "none"),
                f"{run.config['beta']:g}",
                str(run.config["seed"]),
                "finished" if run.summary is not None else "unfinished",
            ]
        )
    note = "Stages busy, and all of them at once: of the time that --timeline recorded."
    table = page.table(heads, rows, left=(0, 1, len(heads) - 1), swatches=True)
    return table + page.text("p", note, "quiet")


def curves(shown: Sequence[Run]) -> str:
    """Error or loss against epochs and seconds, training loss, speed."""
    task = shown[0].task
    metric, factor, unit = task.metric, *((100, ", %") if task.metric == "error" else (1, ""))

    def lines(x: str, y: str, *, train: bool, factor: float = 1) -> list[tuple[list[float], Any]]:
        found = []
        for run in shown:
            points = [(m[x], factor * m[y]) for m in run.lines(train=train) if m[y] is not None]
            found.append(([p[0] for p in points], [p[1] for p in points]))
        return found

    split = shown[0].lines(train=False)[:1]
    name = split[0]["split"] if split else "test"
    by_epoch = lines("epoch", metric, train=False, factor=factor)
    by_second = lines("seconds", metric, train=False, factor=factor)
    loss = lines("epoch", "loss", train=True)
    speed = lines("seconds", runs.speed_name(task), train=True)
    # Errors are fractions, so their axis starts at 0; a loss of 0 would be far from any curve.
    evaluated = functools.partial(page.plot, points=True, from_zero=metric == "error")
    plots = [
        evaluated(f"{name} {metric}{unit}", "epoch", by_epoch),
        evaluated(f"{name} {metric} against time{unit}", "training seconds", by_second),
        page.plot("train loss, mean since the line before", "epoch", loss, from_zero=False),
        page.plot(f"{task.unit} per second since the line before", "training seconds", speed),
    ]
    return f'<div class="plots">{"".join(plots)}</div>'


def section(run: Run) -> list[str]:
    """The section about one run."""
    config, stages = run.config, run.config["stages"]
    kind = "quiet" if run.summary is not None else "mark"
    made = [
        page.text("h2", run.name),
        page.text("p", run.state, kind),
        page.text(
            "p",
            f"{config.get('model')} on {config.get('dataset')}: {config['method']}, "
            f"K = {len(stages)}, batches of {config.get('batch_size')}, seed {config['seed']}",
        ),
    ]
    if run.summary is not None:
        made.append(page.text("p", f"params sha256 {run.summary['params_sha256']}", "quiet"))
    total = sum(row["cost"] for row in stages)
    rows = [
        [
            str(row["stage"]),
            ", ".join(row["devices"]),
            f"{row['layers'][0]} to {row['layers'][1] - 1}",
            f"{row['parameters']:,}",
            f"{100 * row['cost'] / total:.0f} %" if total else "-",
            *(str(row.get(name, "-")) for name in ("delay", "staleness", "in_flight")),
            f"{row.get('shrink', 1):.3g}",
        ]
        for row in stages
    ]
    heads = ["stage", "devices", "layers", "parameters", "cost", "delay", "staleness", "in flight"]
    made += [
        page.text(
            "h3",
            f"Stages, balance {config['balance']:.2f} (mean cost over largest, in "
            f"{config['cost_unit']})",
        ),
        page.table([*heads, "shrink"], rows, left=(1,)),
        page.text("h3", f"Schedule {run.schedule.name}, from the fill on"),
        f'<div class="box">{page.text("pre", str(run.schedule))}</div>',
    ]
    if run.figures is not None:
        made += what_ran_when(run)
    settings = {name: value for name, value in config.items() if name not in DERIVED}
    places = {name: config[name] for name in sorted(DERIVED & config.keys() - {"stages"})}
    made.append("<details><summary>Settings, versions, machine</summary>")
    for values in (settings, places):
        cells = [[name, cell(value)] for name, value in values.items()]
        made += [page.table(["name", "value"], cells, left=(0, 1)), "<br>"]
    return [*made, "</details>"]


def what_ran_when(run: Run) -> list[str]:
    """Utilisation and the timeline."""
    assert run.figures is not None
    rows = []
    for name in ("measured", "simulated"):
        numbers = run.figures[name]
        speed = f"{numbers['batches_per_second']:.3g}"
        rows.append([name, *map(percent, zip(numbers["utilisation"])), speed])
        rows[-1] += map(percent, zip(numbers["at_once"]))
    count = len(run.figures["measured"]["utilisation"])
    heads = ["", *(f"stage {k} busy" for k in range(count)), "batches/s"]
    heads += [f"{n} at once" for n in range(count + 1)]
    made = [page.text("h3", "What ran when"), page.table(heads, rows)]
    if run.picture is not None:
        made += ["<br>", page.picture(run.picture, f"timeline of {run.name}")]
    return made


def percent(parts: Sequence[float]) -> str:
    """Fractions as percentages."""
    return ", ".join(f"{100 * part:.0f} %" for part in parts)


def duration(seconds: float | None) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds is None:
        return "-"
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 36000 else f"{seconds / 3600:.1f} h"


def cell(value: Any) -> str:
    """A value of config.json as a cell."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def names(folders: Sequence[str]) -> list[str]:
    """The names of the runs: the last part of the path, or the whole path if that is ambiguous."""
    short = [pathlib.Path(folder).name or folder for folder in folders]
    return short if len(set(short)) == len(short) else list(folders)


def write(folders: Sequence[str], output: str) -> None:
    """Writes the report of the runs in ``folders``.

    Raises:
      UsageError: no run, or a damaged run; the page cannot be written.
    """
    path = local_path(output, "--output")
    if not folders:
        raise UsageError("WORKDIR: is missing; name one or more folders of runs")
    if not output.endswith(".html"):
        raise UsageError(f"--output={output}: must end in .html; choose such a name")
    found = [runs.read(f, name) for f, name in zip(folders, names(folders), strict=True)]
    if len({run.task for run in found}) > 1:
        other = next(run for run in found if run.task is not found[0].task)
        raise UsageError(
            f"{other.name}: counts {other.task.unit}, {found[0].name} {found[0].task.unit}; give "
            "runs of one program"
        )
    title = found[0].name if len(found) == 1 else f"{len(found)} runs, compared with the first"
    body = [page.text("h1", title), comparison(found), "<br>", curves(found)]
    for run in found:
        body += section(run)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(page.whole(title, body), encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"--output={output}: cannot be written ({error.strerror}); name another file"
        ) from error
    print(f"wrote {output}")


if __name__ == "__main__":
    define_flags()
    command.run(lambda folders: write(folders, FLAGS.output), takes="WORKDIR")
