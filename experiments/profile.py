"""Profiles a training step on CPU: milliseconds by kind of compiled operation.

    python -m experiments.profile --model=resnet20 --image_size=32 --batch_size=128 --workdir=DIR

Traces a few steps of back-propagation on one device and sums the durations of XLA's operations by
kind, using their names in the compiled program. A fused loop counts as the kind of its last
operation; overlapping operations count with their own durations. Writes profile.json and
profile.md. --fast_derivatives=false shows the cost without the models' own derivatives.
"""

from __future__ import annotations

import collections
import gzip
import json
import math
import pathlib
import re
import tempfile
from typing import Any

import jax
from absl import flags

from experiments.benchmarking.contender import Plain
from experiments.benchmarking.workload import Settings, Workload
from experiments.common import command, machine, workdir
from experiments.common.errors import UsageError
from experiments.common.screen import Screen
from experiments.training import setup

FILES = ("profile.json", "profile.md")
FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", "", f"Directory for {', '.join(FILES)}.")
    flags.DEFINE_string("model", "plain16", "As in experiments.cifar.")
    flags.DEFINE_integer("image_size", 16, "Height and width of the random images.")
    flags.DEFINE_integer("batch_size", 32, "Images per mini-batch.")
    flags.DEFINE_string("dtype", "float32", "As in experiments.cifar.")
    flags.DEFINE_bool("fast_derivatives", True, "As in experiments.cifar.")
    flags.DEFINE_integer("steps", 5, "Number of traced steps.", lower_bound=1)
    flags.DEFINE_bool("overwrite", False, "Overwrite earlier results.")


def operations(program: str) -> dict[str, str]:
    """The kind of every operation of a compiled program, by name."""
    found = {}
    for line in program.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\w+\[([\d,]*)\])?", line)
        if match:
            found[match[1]] = kind(match[1], match[3] or "")
    return found


def kind(name: str, shape: str) -> str:
    """The kind of an operation, from its name and the shape of its result."""
    stem = re.sub(r"[.\d]+$", "", name)
    sizes = [int(size) for size in shape.split(",") if size]
    if re.match(r"ynn_fusion|conv", stem):
        if len(sizes) < 4:
            return "reduction"
        # The weight gradient has the shape [channels, size, size, channels].
        kernel = sizes[1] == sizes[2] and sizes[1] in (1, 3, 5, 7)
        return "convolution, weight gradient" if kernel else "convolution, forward and input"
    if "transpose" in stem or stem == "copy":
        return "transpose, copy"
    if "reduce" in stem:
        return "reduction"
    if stem.startswith("cond"):
        return "branch (conv2d)"
    return "elementwise"


def trace(plain: Plain, steps: int) -> dict[str, tuple[float, int]]:
    """Seconds and runs per step of every named event."""
    totals: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.defaultdict(int)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            plain.turn(steps)
        files = list(pathlib.Path(folder).rglob("*.trace.json.gz"))
        if not files:
            raise UsageError("--steps: this platform's profiler wrote no trace; run it on CPU")
        with gzip.open(files[0]) as file:
            events = json.load(file)["traceEvents"]
    for event in events:
        if event.get("ph") == "X":
            totals[event["name"]] += event["dur"] / 1e6 / steps
            counts[event["name"]] += 1
    return {name: (total, math.ceil(counts[name] / steps)) for name, total in totals.items()}


def main() -> None:
    settings = Settings(
        FLAGS.workdir,
        contenders=("backprop",),
        model=FLAGS.model,
        image_size=FLAGS.image_size,
        batch_size=FLAGS.batch_size,
        num_stages=1,
        dtype=FLAGS.dtype,
    )
    settings.check()
    workdir.check(FLAGS.workdir, overwrite=FLAGS.overwrite, files=FILES)
    load, reason = machine.at_rest(settings.max_load)
    setup.prepare_jax(1)
    name = "backprop" if FLAGS.fast_derivatives else "backprop_xla"
    plain = Plain(name, Workload(settings), jax.devices()[:1])
    plain.turn(2)
    alone = min(plain.turn(FLAGS.steps) / FLAGS.steps for _ in range(3))
    program = plain.step.lower(plain.state, *plain.batch).compile().as_text()
    known = operations(program or "")
    kinds: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for event, (seconds, count) in trace(plain, FLAGS.steps).items():
        if event in known:
            kinds[known[event]][0] += seconds
            kinds[known[event]][1] += count
    total = sum(seconds for seconds, _ in kinds.values())
    if not total:
        raise UsageError("--model: the profiler named no operation; only CPU is understood")
    rows = sorted(kinds.items(), key=lambda item: -item[1][0])
    heads = ("kind", "operations", "ms a step", "share")
    lines = [
        (name, str(int(count)), f"{1e3 * seconds:.1f}", f"{100 * seconds / total:.0f} %")
        for name, (seconds, count) in rows
    ]
    lines.append(("all", "", f"{1e3 * total:.1f}", "100 %"))
    derivatives = "own" if FLAGS.fast_derivatives else "XLA's"
    title = (
        f"{FLAGS.model}, {FLAGS.image_size}x{FLAGS.image_size}, batch {FLAGS.batch_size}, "
        f"{FLAGS.dtype}, {derivatives} derivatives: backpropagation, one device, "
        f"{1e3 * alone:.0f} ms a step untraced"
    )
    if reason:
        title += f" (not at rest: {reason})"
    table = [f"# {title}", "", "| " + " | ".join(heads) + " |", "| --- | ---: | ---: | ---: |"]
    table += ["| " + " | ".join(line) + " |" for line in lines]
    results: dict[str, Any] = {
        "title": title,
        "seconds_untraced": alone,
        "seconds": {name: seconds for name, (seconds, _) in rows},
        "machine": {**machine.environment(), **load},
    }
    out = workdir.Workdir(FLAGS.workdir, overwrite=FLAGS.overwrite, files=FILES)
    out.write_json("profile.json", results)
    out.write_bytes("profile.md", ("\n".join(table) + "\n").encode())
    Screen(0).table(title, heads, lines)


if __name__ == "__main__":
    define_flags()
    command.run(main)
