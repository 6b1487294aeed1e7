"""Statistics of a benchmark: medians, ratios and tables from seconds per round."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.benchmarking import held

Table = tuple[str, list[str], list[list[str]]]
LONG = 10  # minimum number of rounds for the table of drifts


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The values of the rounds, and their median, minimum and maximum."""
    return {
        "rounds": list(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def over(seconds: dict[str, list[float]], name: str) -> dict[str, dict[str, Any]]:
    """Speedups over each other contender, per round, so that disturbances of a whole round
    cancel."""
    return {
        other: spread([b / a for a, b in zip(seconds[name], theirs, strict=True)])
        for other, theirs in seconds.items()
    }


def bound(
    alone: Sequence[Sequence[float]], devices: Sequence[str], steps: Sequence[float]
) -> dict[str, Any]:
    """The bound on a contender given by its stages alone.

    Args:
      alone: seconds of each stage, round by round.
      devices: the device of each stage; stages that share one run one at a time.
      steps: seconds of a step of the pipeline, round by round.

    Returns:
      utilisation of each stage, the bound (the busiest device's stages alone), the efficiency
      (bound over step) and the balance (mean over largest).
    """
    rounds = list(zip(*alone, strict=True))
    loads = []
    for times in rounds:
        shares: dict[str, float] = {}
        for device, seconds in zip(devices, times, strict=True):
            shares[device] = shares.get(device, 0.0) + seconds
        loads.append(list(shares.values()))
    return {
        "utilisation": [
            spread([a / s for a, s in zip(times, steps, strict=True)]) for times in alone
        ],
        "bound": spread([max(load) for load in loads]),
        "efficiency": spread([max(load) / s for load, s in zip(loads, steps, strict=True)]),
        "balance": spread([statistics.fmean(load) / max(load) for load in loads]),
    }


def at_once(stages: Sequence[float], steps: Sequence[float]) -> dict[str, Any]:
    """The time of all stages at once, without messages, and its ratio to a step, per round."""
    return {
        "at_once": spread(stages),
        "of_at_once": spread([a / s for a, s in zip(stages, steps, strict=True)]),
    }


def tables(results: dict[str, Any]) -> list[Table]:
    """Title, heads and rows of all tables; ``results`` as in benchmark.json."""
    speed, stages, memory = _speed(results), _stages(results), _memory(results)
    long = [drift(results)] if len(results["rounds"]) >= LONG else []
    return [speed, *([stages] if stages[2] else []), *long, memory]


def _speed(results: dict[str, Any]) -> Table:
    base = results["base"]
    heads = ["contender", "devices", "K", "ms a step", "min", "max", f"x {base}"]
    heads += ["min", "max", "bound, ms", "efficiency", "at once, ms", "of that"]
    rows = []
    for row in results["contenders"]:
        ratio, limit = row["over"][base], row.get("bound", {})
        rows.append(
            [
                row["name"],
                str(row["devices"]),
                str(row["stages"]),
                *_numbers(row["seconds"], 1e3, 1),
                *_numbers(ratio, 1, 2),
                f"{1e3 * limit['bound']['median']:.1f}" if limit else "",
                f"{limit['efficiency']['median']:.3f}" if limit else "",
                f"{1e3 * limit['at_once']['median']:.1f}" if "at_once" in limit else "",
                f"{limit['of_at_once']['median']:.3f}" if "at_once" in limit else "",
            ]
        )
    fair = "" if results["fair"] else f"NOT A FAIR COMPARISON ({'; '.join(results['unfair'])}). "
    title = (
        f"{fair}{describe(results)}; medians. Bound: slowest stage alone. Efficiency: bound / ms. "
        "At once: all stages, without messages"
    )
    return title, heads, rows


def _stages(results: dict[str, Any]) -> Table:
    heads = ["contender", "stage", "layers", "device", "ms", "min", "max", "busy %", "balance"]
    rows = []
    for row in results["contenders"]:
        for k, stage in enumerate(row["parts"] if "bound" in row else []):
            rows.append(
                [
                    row["name"],
                    str(k),
                    "{}-{}".format(*stage["layers"]),
                    stage["device"],
                    *_numbers(stage["seconds"], 1e3, 1),
                    f"{100 * row['bound']['utilisation'][k]['median']:.0f}",
                    f"{row['bound']['balance']['median']:.3f}" if k == 0 else "",
                ]
            )
    return "A stage's programs of one step with nothing else running", heads, rows


def drift(results: dict[str, Any]) -> Table:
    """Whether a contender slows down in a long run, corrected for drift of the machine."""
    base = results["base"]
    heads = ["ms a step in each fifth", *"12345", "last / first", f"x {base}, last / first"]
    rows = []
    for row in results["contenders"]:
        times = fifths(row["seconds"]["rounds"])
        ratios = fifths(row["over"][base]["rounds"])
        cells = [row["name"], *(f"{1e3 * value:.2f}" for value in times)]
        rows.append([*cells, f"{times[-1] / times[0]:.3f}", f"{ratios[-1] / ratios[0]:.3f}"])
    live = [entry["live_bytes"] for entry in results["rounds"]]
    rows.append(["MB alive", *(f"{value / 1e6:.3f}" for value in fifths(live)), "", ""])
    return "Medians of the rounds of each fifth", heads, rows


def fifths(values: Sequence[float]) -> list[float]:
    """The medians of five equal parts; the last includes the remainder."""
    size = len(values) // 5
    bounds = [*range(0, 5 * size, size), len(values)]
    return [statistics.median(values[a:b]) for a, b in itertools.pairwise(bounds)]


def _memory(results: dict[str, Any]) -> Table:
    heads = ["MB held", "stage", *held.PREDICTED, "sum", "predicted", "messages", "other", "all"]
    heads += ["sent a step", "x fdg"]
    rows = []
    sums = {
        row["name"]: sum(stage["measured"] for stage in row["memory"])
        for row in results["contenders"]
    }
    for row in results["contenders"]:
        for stage in row["memory"]:
            rows.append([row["name"], str(stage["stage"]), *_megabytes([stage]), ""])
        if len(row["memory"]) > 1:
            share = f"{sums[row['name']] / sums['fdg']:.3f}" if "fdg" in sums else ""
            rows.append([row["name"], "all", *_megabytes(row["memory"]), share])
    title = "Peak of what a stage holds between programs; sum should be what was predicted"
    return title, heads, rows


def _megabytes(stages: Sequence[dict[str, Any]]) -> list[str]:
    """The sums over some stages."""
    kinds = {kind: sum(stage["bytes"][kind] for stage in stages) for kind in held.KINDS}
    known = all(stage["predicted"] is not None for stage in stages)
    values = [
        *(kinds[kind] for kind in held.PREDICTED),
        sum(stage["measured"] for stage in stages),
        sum(stage["predicted"] for stage in stages) if known else None,
        kinds["messages"],
        kinds["gradients"] + kinds["small"],
        sum(stage["total"] for stage in stages),
        sum(stage["sent"] for stage in stages),
    ]
    return ["" if value is None else f"{value / 1e6:.2f}" for value in values]


def _numbers(values: dict[str, Any], factor: float, digits: int) -> list[str]:
    return [f"{factor * values[name]:.{digits}f}" for name in ("median", "min", "max")]


def describe(results: dict[str, Any]) -> str:
    """A one-line description of the workload."""
    settings = results["settings"]
    size = f"{settings['image_size']}x{settings['image_size']}"
    if settings["model"] == "transformer":
        size = (
            f"{settings['blocks']} blocks of width {settings['width']}, "
            f"{settings['context']} tokens"
        )
    return (
        f"{settings['model']}, {size}, batch {settings['batch_size']}, "
        f"{results['machine']['cores']} cores, {settings['rounds']} rounds of {results['steps']} "
        "steps"
    )


def about_machine(machine: dict[str, Any]) -> list[str]:
    """The machine and its state before the start, in lines."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    averages, others = machine["load_average"], machine["cores_of_others"]
    load = "unknown" if averages is None else " ".join(f"{value:.2f}" for value in averages)
    used = "unknown" if others is None else f"{others:.2f} cores"
    return [
        f"{machine['cores']} cores ({machine['machine']}), {len(machine['devices'])} devices of "
        f"kind {machine['device_kind']}",
        versions,
        f"before it began: load average {load}; used by other programs: {used}",
    ]


def markdown(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [f"- {line}" for line in about_machine(results["machine"])]
    for row in results["contenders"]:
        lines.append(f"- {row['name']}: {row['about']}")
    lines += [f"- {note}" for note in results["notes"]]
    for title, heads, rows in tables(results):
        right = ["---", *["---:"] * (len(heads) - 1)]
        cells = [heads, right, *rows]
        lines += ["", title + ":", ""]
        lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def layers(cuts: Sequence[int], number: int) -> list[list[int]]:
    """First and last layer of each stage."""
    return [[a, b - 1] for a, b in itertools.pairwise((0, *cuts, number))]
