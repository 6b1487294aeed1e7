"""Compares two processes on one core each with one process on one core.

    python -m experiments.two_processes

Runs FDG with K = 2 on the network of the benchmark with one stage per process, and compares it with
the same two stages and with back-propagation in a single process. Every process is pinned to one
core. A round starts each case once, warms it up and times --steps steps. Prints medians, ratios per
round, and the bytes that the two processes exchange per step (fewer with --message_dtype).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments.benchmarking import contender, tables
from experiments.benchmarking.workload import Settings, Workload
from experiments.common import command, machine
from experiments.common.errors import UsageError
from experiments.data import cache
from experiments.training import setup
from experiments.training.config import MESSAGE_DTYPES
from fdg_jax import distributed
from fdg_jax.analysis.stage_bytes import nbytes
from fdg_jax.schedule.action import ACTIVATION, COTANGENT

FLAGS = flags.FLAGS
# The timed cases: number of processes, and contender of the benchmark.
CASES = {
    "two processes, fdg": (2, "fdg"),
    "one process, fdg": (1, "fdg"),
    "one process, backprop": (1, "backprop"),
}
TWO = next(iter(CASES))
MARK = "measured "


def define_flags() -> None:
    flags.DEFINE_integer("rounds", 5, "Number of rounds.", lower_bound=1)
    flags.DEFINE_integer("steps", 20, "Timed steps per round.", lower_bound=1)
    flags.DEFINE_string("model", "plain16", "As in experiments.benchmark.")
    flags.DEFINE_integer("image_size", 16, "Height and width in pixels.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Images per mini-batch.", lower_bound=1)
    flags.DEFINE_enum("message_dtype", "float32", MESSAGE_DTYPES, "As in experiments.cifar.")
    flags.DEFINE_float("max_load", 0.5, "Cores that other programs may use; more is reported.")
    flags.DEFINE_integer("seconds", 900, "Timeout of a process.", lower_bound=1)
    flags.DEFINE_string("case", None, "Internal.")
    flags.DEFINE_string("coordinator", None, "Internal.")
    flags.DEFINE_integer("process_id", 0, "Internal.")


def member() -> None:
    """One process of a case; prints its measurement if it has the last stage."""
    count, name = CASES[FLAGS.case]
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[FLAGS.process_id]})
    # XLA compiles different programs for one core, which its cache does not distinguish.
    jax.config.update("jax_compilation_cache_dir", str(cache.directory() / "compiled_for_one_core"))
    setup.prepare_jax(1)
    if count > 1:
        distributed.initialize(FLAGS.coordinator, count, FLAGS.process_id)
    settings = Settings(
        workdir="none",
        model=FLAGS.model,
        image_size=FLAGS.image_size,
        batch_size=FLAGS.batch_size,
        partition="flops",
        message_dtype=FLAGS.message_dtype,
    )
    settings.check()
    one = contender.make(name, Workload(settings))
    one.turn(one.fill + FLAGS.steps)
    found: dict[str, Any] = {"seconds": one.turn(FLAGS.steps) / FLAGS.steps}
    if isinstance(one, contender.Piped):
        found["bytes"] = sent(one)
        if not one.pipe.stages[-1].here:
            return
    print(MARK + json.dumps(found), flush=True)


def sent(one: contender.Piped) -> int:
    """Bytes of a step's messages between the stages: the pending messages after a step."""
    stages = one.state.stages
    messages = [
        *(own.inbox[ACTIVATION].values for own in stages[1:]),
        *(own.inbox[COTANGENT].values for own in stages[:-1]),
    ]
    # In FDG messages of a tick are consumed in the next, so there is one filled slot for each.
    return nbytes(messages)


def measure(case: str) -> dict[str, Any]:
    """Starts the processes of a case and waits for them.

    Raises:
      UsageError: a process failed or took too long.
    """
    address = f"127.0.0.1:{distributed.free_port()}"
    names = ("steps", "model", "image_size", "batch_size", "message_dtype")
    own = [f"--{name}={FLAGS[name].value}" for name in names]
    own += [f"--case={case}", f"--coordinator={address}"]
    started = []
    try:
        for i in range(CASES[case][0]):
            program = [sys.executable, "-m", "experiments.two_processes", *own, f"--process_id={i}"]
            started.append(
                subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )
        texts = [p.communicate(timeout=FLAGS.seconds)[0].decode() for p in started]
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"--seconds={FLAGS.seconds}: {case} took longer; give more") from error
    finally:
        for process in started:
            process.kill()
            process.wait()
    lines = [line for text in texts for line in text.splitlines() if line.startswith(MARK)]
    if any(p.returncode for p in started) or len(lines) != 1:
        raise UsageError(f"{case} failed: {' '.join(texts)[-500:]}")
    found: dict[str, Any] = json.loads(lines[0].removeprefix(MARK))
    return found


def show(seconds: dict[str, Sequence[float]], size: int) -> None:
    """Prints the table as Markdown."""
    print("| case | ms per step, median (range) | speedup of two processes |")
    print("| --- | ---: | ---: |")
    for case, values in seconds.items():
        ms = [1000 * v for v in values]
        ratios = [b / a for a, b in zip(seconds[TWO], values, strict=True)]
        print(
            f"| {case} | {statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f}) | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    print(f"\nBytes sent in a step, both ways together: {size:,}")


def main() -> None:
    if FLAGS.case is not None:
        member()
        return
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        raise UsageError("cores: two processes need two cores to be pinned to; there are fewer")
    found, reason = machine.at_rest(FLAGS.max_load)
    for line in tables.about_machine({**machine.environment(), **found}):
        print(line)
    if reason:
        print(f"NOT A FAIR COMPARISON: {reason}")
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    size = 0
    for _ in range(FLAGS.rounds):
        for case in CASES:
            measured = measure(case)
            seconds[case].append(measured["seconds"])
            size = measured.get("bytes", size)
    show(dict(seconds), size)


if __name__ == "__main__":
    define_flags()
    command.run(main)
