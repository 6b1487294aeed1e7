"""Simulates schedules with given costs: ideal throughput and timelines.

    python -m experiments.simulate --stages=4 --forward=1 --backward=2 --workdir=runs/simulate

Trains nothing and uses no device. A cost is one number for all stages, or one per stage. Three
blocks are simulated: "ideal" without transfers, "transfer" with --transfer and --latency, "slow"
with one stage slower by --slow_factor and without transfers. The defaults take about 40 s, mostly
for K = 64.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from experiments.common import command, gantt, workdir
from experiments.common.errors import UsageError
from experiments.common.screen import Screen
from experiments.training import methods
from fdg_jax.analysis.costs import PER_STAGE, Costs
from fdg_jax.analysis.simulate import simulate
from fdg_jax.analysis.timeline import Timeline
from fdg_jax.engine.rules import RULES
from fdg_jax.schedule import Schedule, create

FLAGS = flags.FLAGS
METHODS = [name for name, method in methods.METHODS.items() if not method.one_stage]
DEFAULT_METHODS = ["backprop", "fdg", "ddg", "pipedream", "gpipe", "one_f_one_b", "adl"]
FILES = ("simulate.json", "timeline.png", "timeline.trace.json")
TIMES = ("forward", "backward", "weights", "update")
BLOCKS = ("ideal", "transfer", "slow")


def define_flags() -> None:
    flags.DEFINE_list("stages", ["2", "3", "4", "8", "16", "64"], "Numbers of stages.")
    flags.DEFINE_list("methods", DEFAULT_METHODS, f"Any of {', '.join(METHODS)}.")
    flags.DEFINE_list("forward", ["1"], "Seconds of a forward, per stage and mini-batch.")
    flags.DEFINE_list("backward", ["2"], "Seconds of a backward.")
    flags.DEFINE_list("weights", None, "Seconds of a backward for the weights; default: half.")
    flags.DEFINE_list("update", ["0"], "Seconds of an update.")
    flags.DEFINE_list("transfer", ["0"], "Transfer seconds per mini-batch; one or per hop.")
    flags.DEFINE_float("latency", 0.25, "Additional seconds per message.")
    flags.DEFINE_integer("slow_stage", -1, "The slow stage; negative: from the end.")
    flags.DEFINE_float("slow_factor", 2.0, "Slowdown of that stage; 1 skips the block.")
    flags.DEFINE_list("input_bytes", ["0"], "Bytes of a stage's input per mini-batch.")
    flags.DEFINE_list("kept_bytes", None, "Bytes that petra stores; default: the input.")
    flags.DEFINE_list("cotangent_bytes", None, "Bytes of a cotangent; default: the input.")
    flags.DEFINE_list("residual_bytes", ["0"], "Bytes of residuals per mini-batch.")
    flags.DEFINE_list("parameter_bytes", ["0"], "Bytes of the weights.")
    flags.DEFINE_float("optimizer", 1.0, "Optimizer state as a multiple of the weights.")
    flags.DEFINE_integer("microbatches", 4, "For gpipe, one_f_one_b, zero_bubble.")
    flags.DEFINE_integer("accumulate", None, "For adl (default 2), pipedream_2bw (K).")
    flags.DEFINE_enum("gradient", "stale", RULES, "For methods with a free gradient rule.")
    flags.DEFINE_string("workdir", None, "Output directory; default: no files.")
    flags.DEFINE_enum("draw", "fdg", METHODS, "The method of picture and trace.")
    flags.DEFINE_integer("draw_stages", None, "Its stages; default: 4, or the first.")
    flags.DEFINE_integer("draw_batches", 12, "Number of mini-batches drawn.")
    flags.DEFINE_enum("draw_block", "ideal", BLOCKS, "The block drawn.")


def numbers(name: str, count: int, per: str = "stage") -> list[float]:
    """The ``count`` numbers of a flag."""
    given: list[str] = getattr(FLAGS, name)
    try:
        values = [float(text) for text in given]
    except ValueError:
        values = []
    if not values or (len(values) != count and len(values) != 1):
        raise UsageError(
            f"--{name}={','.join(given)}: give one number, or {count} with commas for {count} "
            f"{per}s"
        )
    return values * count if len(values) == 1 else values


def costs(num_stages: int, block: str) -> Costs | None:
    """The costs of a block, or None if the flags disable it."""
    given = [name for name in PER_STAGE if getattr(FLAGS, name) is not None]
    values = {name: numbers(name, num_stages) for name in given}
    transfer = numbers("transfer", num_stages - 1, "hop")
    k, factor = FLAGS.slow_stage, FLAGS.slow_factor
    if not -num_stages <= k < num_stages:
        raise UsageError(
            f"--slow_stage={k}: allowed are {-num_stages} to {num_stages - 1} with {num_stages} "
            "stages"
        )
    if not 0 < factor < float("inf"):
        raise UsageError(f"--slow_factor={factor}: must be above 0; 2 doubles a stage's times")
    try:
        made = Costs(**values, transfer=transfer, latency=FLAGS.latency, optimizer=FLAGS.optimizer)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    if block == "transfer":
        return made if any(transfer) or FLAGS.latency else None
    if block == "slow":
        for name in TIMES:
            if name in values:
                values[name][k] *= factor
    ideal = Costs(**values, transfer=0.0, latency=0.0, optimizer=FLAGS.optimizer)
    return ideal if block == "ideal" or factor != 1 else None


def slow_stage() -> str:
    """A description of the slow stage that holds for every number of stages."""
    k = FLAGS.slow_stage
    if k >= 0:
        return f"stage {k}"
    return "the last stage" if k == -1 else f"stage K-{-k}"


def plan(method: str, num_stages: int) -> Schedule:
    """The schedule of one method."""
    if method not in METHODS:
        raise UsageError(f"--methods={method}: no such method; allowed are {', '.join(METHODS)}")
    name, options = methods.METHODS[method].schedule, ("microbatches", "accumulate")
    try:
        return create(name, num_stages, **{option: getattr(FLAGS, option) for option in options})
    except ValueError as error:
        raise UsageError(f"--{error} ({method}, {num_stages} stages)") from error


def timeline(method: str, num_stages: int, its: Costs, batches: int | None = None) -> Timeline:
    """The timeline of one method with the given costs."""
    gradient = methods.METHODS[method].gradient or FLAGS.gradient
    return simulate(plan(method, num_stages), its, batches, gradient)


def result(method: str, run: Timeline) -> dict[str, Any]:
    """The results of one simulation for simulate.json."""
    stages, its = range(run.schedule.num_stages), run.costs
    alone = sum(its.forward) + sum(its.backward) + sum(its.update)
    return {
        "method": method,
        "stages": len(stages),
        "gradient": run.gradient.name,
        "batches_per_second": run.throughput,
        "over_backprop": run.speedup,
        "over_one_device": run.throughput * alone,
        "utilisation": [run.utilisation(k) for k in stages],
        "in_flight": [run.in_flight(k) for k in stages],
        "microbatches_in_flight": [run.microbatches_in_flight(k) for k in stages],
        "weight_versions": [run.weight_versions(k) for k in stages],
        "peak_bytes": [run.peak_bytes(k) for k in stages],
        "sent_bytes": [run.sent_bytes(k) for k in stages[:-1]],
    }


def row(result: dict[str, Any]) -> list[str]:
    """The results of one simulation as a table row."""
    use = [100 * part for part in result["utilisation"]]
    return [
        result["method"],
        str(result["stages"]),
        f"{result['batches_per_second']:.4g}",
        f"{result['over_backprop']:.2f}",
        f"{result['over_one_device']:.2f}",
        f"{max(use):.0f}",
        f"{sum(use) / len(use):.0f}",
        f"{max(result['in_flight'])}",
        f"{max(result['weight_versions'])}",
        *([f"{max(result['peak_bytes']):.4g}"] if any(result["peak_bytes"]) else []),
    ]


HEADS = [
    *("method", "K", "batches/s", "x backprop", "x one device"),
    *("busiest %", "mean %", "in flight", "versions", "bytes"),
]


def files() -> Iterator[tuple[str, bytes]]:
    """The picture and the trace of --draw."""
    method, num_stages, block = FLAGS.draw, drawn_stages(), FLAGS.draw_block
    its = costs(num_stages, block)
    assert its is not None
    run, steady = (
        timeline(method, num_stages, its, FLAGS.draw_batches),
        timeline(method, num_stages, its),
    )
    title = (
        f"{method}, {num_stages} stages, {block}; in steady state {steady.speedup:.2f} x backprop"
    )
    yield FILES[1], gantt.draw([(title, run)])
    yield FILES[2], (json.dumps(run.chrome_trace()) + "\n").encode()


def drawn_stages() -> int:
    """The number of stages in the picture."""
    if FLAGS.draw_stages is not None:
        return FLAGS.draw_stages
    return 4 if "4" in FLAGS.stages else int(FLAGS.stages[0])


def check() -> list[int]:
    """Validates all flags; returns the numbers of stages."""
    try:
        stages = [int(text) for text in FLAGS.stages]
    except ValueError:
        stages = []
    if not stages or min(stages) < 1:
        raise UsageError(f"--stages={','.join(FLAGS.stages)}: give whole numbers above 0: 2,3,4")
    if not FLAGS.methods:
        raise UsageError(f"--methods=: give at least one of {', '.join(METHODS)}")
    for name in ("draw_stages", "draw_batches"):
        value: int | None = getattr(FLAGS, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value}: must be 1 or more")
    for k in stages:
        costs(k, "ideal")
        for method in FLAGS.methods:
            plan(method, k)
    if FLAGS.workdir is not None:
        plan(FLAGS.draw, drawn_stages())
        if costs(drawn_stages(), FLAGS.draw_block) is None:
            raise UsageError(f"--draw_block={FLAGS.draw_block}: the flags leave it out; draw ideal")
        others = set(workdir.FILES) - set(FILES)
        if any((pathlib.Path(FLAGS.workdir).expanduser() / name).exists() for name in others):
            raise UsageError(
                f"--workdir={FLAGS.workdir}: holds a training run; name another folder"
            )
        workdir.check(FLAGS.workdir, overwrite=True, files=FILES)
    return stages


def main() -> None:
    stages = check()
    screen, blocks = Screen(0), []
    given = [name for name in TIMES if getattr(FLAGS, name) is not None]
    seconds = (f"{name} {','.join(getattr(FLAGS, name))}" for name in given)
    screen.line(
        f"A stage's seconds for one mini-batch: {', '.join(seconds)} (--{', --'.join(given)})"
    )
    about = {
        "ideal": "no transfers",
        "transfer": f"{','.join(FLAGS.transfer)} s a mini-batch + {FLAGS.latency:g} s a message",
        "slow": f"{slow_stage()} takes {FLAGS.slow_factor:g} times as long, no transfers",
    }
    for block in BLOCKS:
        rows = []
        for k in stages:
            its = costs(k, block)
            rows += [result(m, timeline(m, k, its)) for m in FLAGS.methods if its is not None]
        if rows:
            blocks.append({"block": block, "about": about[block], "rows": rows})
            lines = [row(r) for r in rows]
            screen.table(f"{block}: {about[block]}", HEADS[: len(lines[0])], lines)
    sized = ", bytes" if len(lines[0]) == len(HEADS) else ""
    screen.line(
        "backprop: the same stages and transfers, one batch at a time\n"
        "one device: all stages on one, no transfers\n"
        "busiest, mean: share of the time in which a stage works\n"
        "in flight: mini-batches of which a stage keeps residuals\n"
        f"in flight, versions{sized}: of the stage with most"
    )
    if FLAGS.workdir is not None:
        drawn = dict(files())
        folder = workdir.Workdir(FLAGS.workdir, overwrite=True, files=FILES)
        settings = {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
        folder.write_json(FILES[0], {"flags": settings, "blocks": blocks})
        for name, content in drawn.items():
            folder.write_bytes(name, content)
        screen.line(f"wrote simulate.json, {', '.join(drawn)} to {FLAGS.workdir}")


if __name__ == "__main__":
    define_flags()
    command.run(main)
