"""accelerator.md: the tables of a record, as used in BENCHMARKS.md and EXPERIMENTS.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.accelerating.record import DONE, FAILED

Rows = Mapping[str, Mapping[str, Any]]


def markdown(machine: Mapping[str, Any], settings: Mapping[str, Any], rows: Rows) -> str:
    """The page; parts without rows are omitted."""
    memory = machine.get("memory_bytes")
    size = f", {memory / 1e9:.0f} GB" if memory else ""
    versions = machine["versions"]
    lines = [
        f"# {machine['device_kind']}",
        "",
        f"One of {len(machine['devices'])} {machine['platform']} devices{size}; "
        f"{machine['cores']} cores; Python {versions['python']}, jax {versions['jax']}, jaxlib "
        f"{versions['jaxlib']}, fdg_jax {versions['fdg_jax']}.",
    ]
    if settings["rehearse"]:
        lines += ["", "**A rehearsal with tiny networks: none of its figures says anything.**"]
    for part in (tests, times, trainings):
        if found := part(rows):
            lines += ["", *found]
    return "\n".join(lines) + "\n"


def tests(rows: Rows) -> list[str]:
    """The passed and failed tests."""
    chosen = {name: row for name, row in rows.items() if row["part"] == "tests"}
    if not chosen:
        return []
    passed = sum(row["state"] == DONE for row in chosen.values())
    table = [
        [name.partition("/")[2], _result(row), f"{row['seconds']:.0f}"]
        for name, row in chosen.items()
    ]
    head = ["## Tests", "", f"{passed} of {len(chosen)} passed.", ""]
    return [*head, *_table(["test", "result", "seconds"], table)]


def times(rows: Rows) -> list[str]:
    """A table per network: milliseconds per step and peak memory, by dtype."""
    lines: list[str] = []
    for network in networks(rows):
        own = {name.split("/", 2)[2]: row for name, row in rows.items() if _of(name, network)}
        dtypes = list(dict.fromkeys(key.split("/")[0] for key in own))
        loops = list(dict.fromkeys(key.split("/")[1] for key in own))
        heads = ["training loop"]
        for dtype in dtypes:
            heads += [f"{dtype}, ms per step (range)", "x backprop", "peak GB"]
        table = []
        for loop in loops:
            line = [shown(loop)]
            for dtype in dtypes:
                row = own.get(f"{dtype}/{loop}")
                line += cells(row, own.get(f"{dtype}/backprop"))
            table.append(line)
        done = [row["found"] for row in own.values() if row["state"] == DONE]
        about: list[str] = []
        if done:
            about = [f"{done[0]['parameters'] / 1e6:.2f} M parameters, {done[0]['about']}.", ""]
        lines += ["", f"## {network}, one device", "", *about, *_table(heads, table)]
    if lines:
        lines += [
            "",
            "Every case ran in its own process: medians and ranges over rounds; x backprop: time "
            "relative to backprop, less is faster. Peak: the device's own statistics, over the "
            "whole process, with initialisation and compilation. float32 is computed in JAX's "
            "default precision, which may be less than float32 on this device.",
        ]
    return lines[1:]


def cells(row: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> list[str]:
    """Time, ratio and memory of a case."""
    if row is None:
        return ["", "", ""]
    if row["state"] != DONE:
        return [_result(row), "", ""]
    found = row["found"]
    low, middle, high = (1e3 * found["seconds"][name] for name in ("min", "median", "max"))
    against = ratio(row, base)
    peak = found["peak_bytes"]
    return [
        f"{middle:.3g} ({low:.3g} to {high:.3g})" + ("" if found["loss"] is not None else ", NaN"),
        "" if against is None else f"{against:.2f}",
        "" if peak is None else f"{peak / 1e9:.2f}",
    ]


def ratio(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> float | None:
    """Time of a case relative to another's; None if either is missing."""
    if base is None or row["state"] != DONE or base["state"] != DONE:
        return None
    own: float = row["found"]["seconds"]["median"]
    return own / float(base["found"]["seconds"]["median"])


def networks(rows: Rows) -> list[str]:
    """The networks with a timed case, in the order of the rows."""
    names = [name.split("/")[1] for name, row in rows.items() if row["part"] == "times"]
    return list(dict.fromkeys(names))


def shown(loop: str) -> str:
    """The name of a training loop in tables."""
    match = re.fullmatch(r"one_device_k(\d+)(_dispatched)?", loop)
    if match is None:
        return {"engine_k1": "engine, K = 1"}.get(loop, loop)
    return f"FDG, K = {match[1]}, {'dispatched' if match[2] else 'compiled'}"


def trainings(rows: Rows) -> list[str]:
    """Errors of finished and unfinished runs."""
    chosen = {name: row for name, row in rows.items() if row["part"] == "training"}
    if not chosen:
        return []
    table = []
    for name, row in chosen.items():
        _, network, run = name.split("/")
        found = row["found"]
        if not found:
            table.append([network, run, *[""] * 7, _result(row)])
            continue
        beta = f"{found['beta']:g}" if found["method"] == "fdg" else ""
        table.append(
            [
                found["model"],
                found["method"],
                str(found["num_stages"]),
                beta,
                f"{found['epoch']:.4g} of {found['epochs']}",
                _percent(found["error"]),
                _percent(found["best_error"]),
                "" if found["train_seconds"] is None else f"{found['train_seconds']:.0f}",
                "" if found["images_per_second"] is None else f"{found['images_per_second']:,.0f}",
                "finished" if row["state"] == DONE else _result(row),
            ]
        )
    heads = ["network", "method", "K", "beta", "epochs", "error, %", "best, %", "seconds"]
    heads += ["images/s", "state"]
    data = next((row["found"]["dataset"] for row in chosen.values() if row["found"]), "")
    split = next((row["found"]["split"] for row in chosen.values() if row["found"]), None)
    text = f"{data}; errors on the {split or 'test'} split, one seed, all stages on one device "
    text += "unless there are more. The error of a run that is not finished is that of its last "
    text += "evaluation, before the learning rate has fallen, and compares with no other."
    return ["## Training", "", text, "", *_table(heads, table)]


def _of(name: str, network: str) -> bool:
    return name.startswith(f"times/{network}/")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _result(row: Mapping[str, Any]) -> str:
    """The result of a row in one word, or its error, as a cell."""
    if row["state"] == FAILED:
        return "failed: " + str(row["error"]).replace("|", "/")
    return {"done": "passed"}.get(row["state"], "not finished")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
