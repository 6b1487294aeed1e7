"""Benchmarks FDG, back-propagation and alternatives on the same network, batch and optimizer.

    python -m experiments.benchmark --flagfile=experiments/flags/benchmark_cpu.cfg --workdir=DIR

Contenders: backprop (one jitted step on one device); backprop_one_core (the same in a process
pinned to one core); backprop_xla (derivatives by JAX and XLA only); backprop_untuned (the same in
its own process, without retained memory); data_parallel (one jitted step on K devices); the methods
of experiments.cifar with one device per stage; fdg_recompute and fdg_recompute_stale (FDG with
another gradient rule); engine_k1 (the engine with one stage); one_device_k<K> (FDG with all stages
on one device); one_device_k<K>_dispatched (the same with one program per stage instead of one per
tick); fdg_two_processes (FDG with one process and one core per stage); backprop_torch,
backprop_torch_one_core, ddp_torch, gpipe_torch, one_f_one_b_torch, zero_bubble_torch and fdg_torch
(the same network in PyTorch: plain networks and the transformer).

In each round every contender, and every stage of FDG alone, has one turn; the order rotates from
round to round. Writes benchmark.json, benchmark.md and benchmark.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from experiments.benchmarking import bars, contender, held, tables
from experiments.benchmarking.alone import Alone, turn
from experiments.benchmarking.child import OneCore, OneCoreEach, Untuned
from experiments.benchmarking.contender import Contender, Piped
from experiments.benchmarking.other_process import LeftOut
from experiments.benchmarking.torch_row import Torch
from experiments.benchmarking.workload import ALLOWED, PIPED, TORCH, Settings, Workload
from experiments.common import command, fields, machine, workdir
from experiments.common.errors import UsageError
from experiments.common.screen import Screen
from experiments.images.settings import DTYPES
from experiments.training import family, setup
from experiments.training.config import MESSAGE_DTYPES

FILES = ("benchmark.json", "benchmark.md", "benchmark.png")
# Settings that only name locations.
PLACES = ("workdir", "torch_python", "overwrite")
HELP = {
    "workdir": f"Directory for {', '.join(FILES)}.",
    "contenders": f"Contenders to time, any of {ALLOWED}. Ratios are relative to backprop, or "
    "to the first contender without it.",
    "model": "As in experiments.cifar, or transformer; plain16 has equal layers.",
    "image_size": "Height and width of the random images.",
    "batch_size": "Images or sequences per mini-batch.",
    "width": "Width of the transformer.",
    "blocks": "Blocks of the transformer.",
    "heads": "Attention heads of the transformer.",
    "context": "Sequence length of the transformer, in tokens.",
    "num_stages": "K, the number of stages, one device each if there are enough cores.",
    "microbatches": "Micro-batches per mini-batch in gpipe, one_f_one_b and zero_bubble, also of "
    "PyTorch.",
    "partition": "Partition by measured time, by flops, or at K-1 layer numbers (for K = "
    "--num_stages; one_device_k<K> with another K is then partitioned by flops).",
    "dtype": f"Dtype of activations and their gradients, one of {DTYPES}.",
    "message_dtype": f"Dtype of messages between stages, one of {MESSAGE_DTYPES}; float32 means no "
    "conversion.",
    "synthesizer_width": family.HELP["synthesizer_width"],
    "rounds": "Number of turns of each contender.",
    "steps": "Steps per turn; 0: as many as backprop runs in --turn_seconds.",
    "turn_seconds": "See --steps.",
    "warmup_steps": "Warm-up steps before the first round, after the pipelines are filled.",
    "max_load": "Processor cores that other programs may use for the comparison to count as fair.",
    "torch_python": "Python interpreter for the contenders in PyTorch; skipped if it has no torch.",
    "seed": "Seed of initial weights, inputs and labels.",
    "overwrite": "Overwrite earlier results in the workdir.",
}

Turn = Callable[[int], float]


def run(settings: Settings) -> dict[str, Any]:
    """Measures, prints and writes; returns the contents of benchmark.json.

    Raises:
      UsageError: an invalid setting; nothing has been written.
    """
    settings.check()
    folder = pathlib.Path(settings.workdir).expanduser()
    if any((folder / name).exists() for name in workdir.FILES):
        raise UsageError(f"--workdir={settings.workdir}: holds a training run; name another folder")
    workdir.check(settings.workdir, overwrite=settings.overwrite, files=FILES)
    screen = Screen(0)
    # --- The load of the machine, before this program adds to it.
    found, reason = machine.at_rest(settings.max_load)
    setup.prepare_jax(settings.num_stages)
    about = {**machine.environment(), **found}
    for line in tables.about_machine(about):
        screen.line(line)
    unfair = [reason] if reason else []
    if reason:
        screen.line(f"NOT A FAIR COMPARISON: {reason}; --max_load={settings.max_load:g}")
    work = Workload(settings)
    with contextlib.ExitStack() as stack:
        contenders, rows, notes = warm_up(work, screen, stack)
        alone = {c.name: alones(c) for c in contenders}
        seconds, log = rounds(work, contenders, alone, screen)
    used = [entry["cores_of_others"] or 0.0 for entry in log["rounds"]]
    if disturbed := [value for value in used if value > settings.max_load]:
        unfair.append(
            f"other programs used up to {max(disturbed):.2f} cores in {len(disturbed)} of "
            f"{len(used)} rounds"
        )
    # --- Quantities derived from the seconds.
    base = "backprop" if "backprop" in rows else contenders[0].name
    own = {c.name: seconds[c.name] for c in contenders}
    for c in contenders:
        row = rows[c.name]
        row["seconds"], row["over"] = tables.spread(own[c.name]), tables.over(own, c.name)
        if alone[c.name]:
            times = [seconds[stage.name] for stage in alone[c.name]]
            for part, values in zip(row["parts"], times, strict=True):
                part["seconds"] = tables.spread(values)
            devices = [part["device"] for part in row["parts"]]
            row["bound"] = tables.bound(times, devices, own[c.name])
            if len(times) > 1:
                row["bound"] |= tables.at_once(seconds[at_once(c)], own[c.name])
        row["loss"] = c.loss if math.isfinite(c.loss) else None
        if row["loss"] is None:
            unfair.append(f"{c.name} computes with numbers that are not finite")
    results = {
        "settings": {
            name: value
            for name, value in dataclasses.asdict(settings).items()
            if name not in PLACES
        },
        "machine": about,
        "fair": not unfair,
        "unfair": unfair,
        "notes": notes,
        "base": base,
        "contenders": [rows[c.name] for c in contenders],
        "layer_costs": list(work.layer_costs),
        "cost_unit": work.unit,
        **log,
    }
    # --- Files first, since the terminal may be gone by now.
    out = workdir.Workdir(settings.workdir, overwrite=settings.overwrite, files=FILES)
    out.write_json("benchmark.json", results)
    out.write_bytes("benchmark.md", tables.markdown(results).encode())
    out.write_bytes("benchmark.png", bars.draw(results))
    for title, heads, lines in tables.tables(results):
        screen.table(title, heads, lines)
    screen.line(f"wrote {', '.join(FILES)} to {settings.workdir}")
    return results


def warm_up(
    work: Workload, screen: Screen, stack: contextlib.ExitStack
) -> tuple[list[Contender], dict[str, dict[str, Any]], list[str]]:
    """Creates, compiles and fills every contender, and counts its bytes.

    Returns:
      The contenders, their rows by name, and notes on skipped contenders.
    """
    contenders: list[Contender] = []
    rows: dict[str, dict[str, Any]] = {}
    notes = []
    for name in dict.fromkeys(work.settings.contenders):
        start, before = time.perf_counter(), held.live()
        try:
            made = make(name, work)
        except LeftOut as why:
            notes.append(f"{name} is skipped: {why}")
            screen.line(notes[-1])
            continue
        stack.callback(made.close)
        contenders.append(made)
        made.turn(made.fill + work.settings.warmup_steps)
        memory = held.table(made)
        live = {device: size - before[device] for device, size in held.live().items()}
        rows[name] = {
            "name": name,
            "about": made.about,
            "devices": made.devices,
            "stages": made.stages,
            "memory": memory,
            "live_bytes": live,
        }
        if isinstance(made, Piped):
            spans = tables.layers(made.split.cuts, made.split.layers)
            rows[name] |= {"cuts": list(made.split.cuts), "gradient": made.gradient}
            rows[name]["parts"] = [
                {"layers": span, "device": str(stage.mesh.devices.flat[0])}
                for span, stage in zip(spans, made.pipe.stages, strict=True)
            ]
        if isinstance(made, Torch):
            rows[name]["torch"] = made.ready
        screen.line(f"{name}: {made.about}; ready after {time.perf_counter() - start:.1f} s")
    if not contenders:
        raise UsageError("--contenders: none of them can run here; add backprop")
    return contenders, rows, notes


def make(name: str, work: Workload) -> Contender:
    """Creates a contender, in this process or its own."""
    if name in TORCH:
        return Torch(name, work)
    if name == "fdg_two_processes":
        return OneCoreEach(name, work)
    if name == "backprop_one_core":
        return OneCore(name, work.settings)
    if name == "backprop_untuned":
        return Untuned(name, work.settings)
    return contender.make(name, work)


def alones(made: Contender) -> list[Alone]:
    """The stages of FDG, each alone; in other schedules a stage waits within a tick."""
    if not isinstance(made, Piped) or made.schedule.name != "fdg" or made.name not in PIPED:
        return []
    return [Alone(made, k) for k in range(made.stages)]


def at_once(made: Contender) -> str:
    """The name for all stages at once, without messages between them."""
    return f"{made.name} stages at once"


def rounds(
    work: Workload,
    contenders: Sequence[Contender],
    alone: dict[str, list[Alone]],
    screen: Screen,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds per step by name, round by round, and a log of the rounds."""
    settings = work.settings
    turns: list[tuple[str, Turn]] = [(c.name, c.turn) for c in contenders]
    for c in contenders:
        groups = {stage.name: [stage] for stage in alone[c.name]}
        if len(groups) > 1:
            groups[at_once(c)] = alone[c.name]
        turns += [(name, functools.partial(turn, group)) for name, group in groups.items()]
    processes = [pid for c in contenders for pid in c.processes]
    trial = {name: take(2) / 2 for name, take in turns}  # also compiles the rest
    pace = "backprop" if "backprop" in trial else contenders[0].name
    period = math.lcm(*(c.schedule.period for c in contenders if isinstance(c, Piped)), 1)
    steps = settings.steps or period * math.ceil(settings.turn_seconds / trial[pace] / period)
    seconds: dict[str, list[float]] = {name: [] for name, _ in turns}
    log = []
    for r in range(settings.rounds):
        first = r % len(turns)
        before = machine.usage(processes)
        for name, take in turns[first:] + turns[:first]:
            seconds[name].append(take(steps) / steps)
        after = machine.usage(processes)
        others = machine.cores_of_others(before, after)
        live = sum(held.live().values())
        log.append({"first": turns[first][0], "cores_of_others": others, "live_bytes": live})
        left = math.ceil((settings.rounds - r - 1) * (after.wall - before.wall))
        times = "  ".join(f"{c.name} {1e3 * seconds[c.name][-1]:.0f}" for c in contenders)
        used = "unknown" if others is None else f"{others:.2f} cores"
        screen.line(
            f"round {r + 1}/{settings.rounds}  {left} s left  others use {used}  "
            f"arrays {live / 1e6:.1f} MB  ms: {times}"
        )
    return seconds, {"steps": steps, "rounds": log}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one flag per field of `Settings`."""
    fields.define(Settings, HELP, values)


def from_flags(parsed: flags.FlagValues = flags.FLAGS) -> Settings:
    """The settings given by the flags."""
    values = fields.given(Settings, parsed)
    return Settings(**{**values, "contenders": tuple(values["contenders"])})


def main() -> None:
    run(from_flags())


if __name__ == "__main__":
    define_flags()
    command.run(main)
