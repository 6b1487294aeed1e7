"""Predicts speedup, memory and staleness of the methods for a network on these devices.

    python -m experiments.advise --model=my_model:make
    python -m experiments.advise --model=plain16 --image_size=16 --measure --workdir=runs/advise

--model names a function without arguments that returns (layers, (inputs, labels)) and optionally a
loss function, or a network of this project. Layers and messages are measured, and the simulator
predicts back-propagation, data parallelism, 1F1B, DDG and FDG on 1 to D devices. --measure then
trains with each method on one device and on all devices, in interleaved rounds, and prints
predicted and measured throughput. With --workdir it writes advise.json.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from typing import Any

import jax
import optax
from absl import flags

from experiments.benchmarking.model import Model, Sizes, load
from experiments.benchmarking.turns import Turns, rounds
from experiments.common import command, machine, workdir
from experiments.common.errors import UsageError
from experiments.common.screen import Screen
from experiments.training import setup
from experiments.training.config import blame
from fdg_jax.analysis.advice import Advice
from fdg_jax.analysis.advise import advise, mean_square
from fdg_jax.partition import units_of

FLAGS = flags.FLAGS
FILES = ("advise.json",)
# Small learning rates, since labels are random.
OPTIMIZERS = {"sgd": optax.sgd(1e-3, momentum=0.9), "adamw": optax.adamw(1e-4)}
# Tolerated relative error of a prediction.
WITHIN = 0.1


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    own = Sizes()

    def integer(name: str, default: int, text: str, least: int = 1) -> None:
        flags.DEFINE_integer(name, default, text, lower_bound=least, flag_values=values)

    def number(name: str, default: float, text: str) -> None:
        flags.DEFINE_float(name, default, text, flag_values=values)

    flags.DEFINE_string(
        "model",
        "",
        "module:function, transformer, or as in experiments.cifar.",
        flag_values=values,
    )
    integer(
        "num_stages",
        0,
        "Largest K and number of devices; 0: all devices, on CPU 2. On CPU this many devices are "
        "created, up to the number of cores.",
        least=0,
    )
    flags.DEFINE_enum(
        "optimizer",
        "sgd",
        list(OPTIMIZERS),
        "Optimizer of every stage; sgd has momentum.",
        flag_values=values,
    )
    integer("microbatches", 4, "Micro-batches of one_f_one_b.")
    number("seconds", 20.0, "Time for measuring layers and stages after compilation.")
    integer("batch_size", own.batch_size, "Mini-batch size, for models of the project.")
    integer("image_size", own.image_size, "Size of the random images, for models of the project.")
    integer("width", own.width, "Width of the transformer.")
    integer("blocks", own.blocks, "Blocks of the transformer.")
    integer("heads", own.heads, "Attention heads of the transformer.")
    integer("context", own.context, "Sequence length of the transformer, in tokens.")
    flags.DEFINE_bool(
        "measure", False, "Whether to train with each predicted method.", flag_values=values
    )
    integer("rounds", 5, "With --measure: number of rounds.")
    number("turn_seconds", 3.0, "With --measure: seconds of back-propagation per round.")
    number("max_load", 0.5, "Cores that other processes may use; more is reported as unfair.")
    flags.DEFINE_string(
        "workdir", None, f"Directory for {FILES[0]}; None: not written.", flag_values=values
    )
    flags.DEFINE_bool(
        "overwrite",
        False,
        "Whether earlier results in the workdir may be replaced.",
        flag_values=values,
    )


def check() -> Sizes:
    """Checks all flags before any work is done; returns the sizes."""
    if not FLAGS.model:
        raise UsageError("--model: is missing; name module:function, or a model such as plain16")
    names = [field.name for field in dataclasses.fields(Sizes)]
    for name in names:
        if ":" in FLAGS.model and FLAGS[name].present:
            raise UsageError(
                f"--{name}={FLAGS[name].value}: is for the project's own models; "
                f"{FLAGS.model} makes its own batch, so leave it out"
            )
    for name, least in (("seconds", 0.0), ("turn_seconds", 1e-9), ("max_load", 0.0)):
        value: float = getattr(FLAGS, name)
        if not least <= value < math.inf:
            raise UsageError(f"--{name}={value}: must be finite, and {least:g} or more")
    if FLAGS.workdir is not None:
        workdir.check(FLAGS.workdir, overwrite=FLAGS.overwrite, files=FILES)
    return Sizes(**{name: getattr(FLAGS, name) for name in names})


def compare(advice: Advice, model: Model, screen: Screen) -> list[dict[str, Any]]:
    """Trains with every method on one device and on all; predicted and measured throughput."""
    most = max(row.devices for row in advice.rows)
    rows = [row for row in advice.rows if row.devices in (1, most)]
    how = model.loss_fn or mean_square, OPTIMIZERS[FLAGS.optimizer], FLAGS.microbatches
    turns = []
    for row in rows:
        turns.append(Turns(row, model, *how))
        screen.line(f"{row.method} on {row.devices}: ready")
    speeds = rounds(turns, FLAGS.rounds, FLAGS.turn_seconds, screen.line)
    found = []
    for row, measured in zip(rows, speeds, strict=True):
        median = statistics.median(measured)
        found.append(
            {
                "method": row.method,
                "devices": row.devices,
                "predicted": row.throughput,
                "measured": measured,
                "median": median,
                "ratio": row.throughput / median,
            }
        )
    return found


def show(found: list[dict[str, Any]], screen: Screen) -> None:
    """Prints the comparison as a table."""
    lines = [
        [
            one["method"],
            str(one["devices"]),
            f"{one['predicted']:.4g}",
            f"{one['median']:.4g}",
            f"{min(one['measured']):.4g} to {max(one['measured']):.4g}",
            f"{one['ratio']:.3f}",
        ]
        for one in found
    ]
    heads = ["method", "devices", "predicted", "measured", "range", "ratio"]
    screen.table("Mini-batches a second", heads, lines)
    within = sum(abs(one["ratio"] - 1) <= WITHIN for one in found)
    screen.line(f"{within} of {len(found)} predictions are within {100 * WITHIN:.0f} %")


def main() -> None:
    sizes = check()
    screen = Screen(0)
    load_found, reason = machine.at_rest(FLAGS.max_load)
    setup.prepare_jax(FLAGS.num_stages or 2)
    model = load(FLAGS.model, sizes)
    devices = jax.devices()
    if FLAGS.num_stages > len(devices):
        raise UsageError(
            f"--num_stages={FLAGS.num_stages}: there are {len(devices)} devices, on CPU one a core "
            f"at most; choose 1 to {len(devices)}"
        )
    devices = devices[: FLAGS.num_stages or len(devices)]
    screen.line(f"measuring {len(units_of(model.layers))} layers on {len(devices)} devices")
    if reason:
        screen.line(f"THE MACHINE IS NOT AT REST: {reason}; --max_load={FLAGS.max_load:g}")
    with blame(f"model={FLAGS.model}"):
        advice = advise(
            model.layers,
            model.batch,
            devices,
            model.loss_fn,
            OPTIMIZERS[FLAGS.optimizer],
            FLAGS.microbatches,
            FLAGS.seconds,
        )
    screen.line(str(advice))
    found = compare(advice, model, screen) if FLAGS.measure else []
    if found:
        show(found, screen)
    if FLAGS.workdir is not None:
        out = workdir.Workdir(FLAGS.workdir, overwrite=FLAGS.overwrite, files=FILES)
        settings = {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
        out.write_json(
            FILES[0],
            {
                "flags": settings,
                "machine": {**machine.environment(), **load_found},
                "fair": reason is None,
                "rows": [dataclasses.asdict(row) for row in advice.rows],
                "layers": [
                    {**setting._asdict(), **times._asdict()}
                    for setting, times in advice.measured.layers.items()
                ],
                "stages": {
                    str(k): [
                        {**setting._asdict(), **times._asdict()} for setting, times in own.items()
                    ]
                    for k, own in advice.measured.stages.items()
                },
                "hops": {str(k): hops for k, hops in advice.measured.hops.items()},
                "latency": advice.measured.latency,
                "crossing": advice.crossing,
                "recommendation": advice.recommendation,
                "notes": advice.notes,
                "comparison": found,
            },
        )
        screen.line(f"wrote {FILES[0]} to {FLAGS.workdir}")


if __name__ == "__main__":
    define_flags()
    command.run(main)
