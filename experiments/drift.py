"""Measures the error of PETRA's reconstructed inputs by learning rate and stage.

    python -m experiments.drift --workdir=runs/drift

Trains a small reversible network on the bundled images, or on --dataset, with every learning rate.
In the last steps it measures |x~ - x| / |x| for every stage but the last two: x is the stage's
output at the forward of a mini-batch, x~ its later reconstruction by the next stage at newer
weights. The last stage sends its true input. Writes drift.json and drift.png; takes a few minutes.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from matplotlib.figure import Figure

import fdg_jax as fdg
from experiments import data
from experiments.common import command, machine, workdir
from experiments.common.errors import UsageError
from experiments.common.screen import Screen
from experiments.training import setup
from experiments.training.task import loss_fn
from fdg_jax.models.block import Head
from fdg_jax.repeat import Repeat
from fdg_jax.schedule.action import ACTIVATION, COTANGENT
from fdg_jax.typing import PyTree

Shown = Callable[[list[fdg.Metrics]], None]

FLAGS = flags.FLAGS
FILES = ("drift.json", "drift.png")
GIVEN = ("dataset", "num_stages", "blocks", "steps", "last", "batch_size", "seed")


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Directory for drift.json and drift.png.", required=True)
    flags.DEFINE_string("dataset", "fashion_mnist_small", "As in experiments.cifar.")
    flags.DEFINE_list("learning_rates", ["0.001", "0.01", "0.1"], "One training run each.")
    flags.DEFINE_integer("num_stages", 4, "Number of stages K.")
    flags.DEFINE_integer("blocks", 8, "Reversible blocks between stem and head.")
    flags.DEFINE_integer("steps", 60, "Mini-batches per training run.")
    flags.DEFINE_integer("last", 20, "Number of last steps that are measured.")
    flags.DEFINE_integer("batch_size", 32, "Images per mini-batch.")
    flags.DEFINE_integer("seed", 0, "Seed of weights and data.")
    flags.DEFINE_bool("overwrite", False, "Overwrite earlier results.")


def network(blocks: int, num_classes: int, channels: int) -> list[fdg.Layer]:
    """Stem and blocks of `fdg_jax.models.small_revnet`, all of one width, and a head."""
    stem, group, *_ = fdg.models.small_revnet(num_classes, channels)
    assert isinstance(group, Repeat)
    width = 16
    head = fdg.from_nnx(lambda rngs: Head(2 * width, num_classes, rngs=rngs))
    joined = fdg.from_fn(lambda streams: jnp.concatenate(streams, axis=-1))
    return [stem, group.of(blocks), fdg.chain([joined, head])]


def batches(dataset: data.Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless normalised mini-batches."""
    images, labels = dataset.train_images, dataset.train_labels
    for x, y in data.Loader(images, labels, FLAGS.batch_size, seed=FLAGS.seed):
        yield (x.astype(np.float32) / 255 - dataset.mean) / dataset.std, y


def train(dataset: data.Dataset, rate: float, shown: Shown) -> list[float]:
    """The reconstruction error of every stage but the last two, after training with one rate."""
    source = batches(dataset)
    first, count = next(source), FLAGS.num_stages
    layers = network(FLAGS.blocks, dataset.num_classes, dataset.image_shape[-1])
    pipe = fdg.Pipeline(
        fdg.partition(layers, count, first[0]),
        loss_fn,
        optax.sgd(rate, momentum=0.9),
        devices=jax.devices()[:count],  # may be fewer
        **fdg.methods.petra(count),
    )
    state = pipe.init(jax.random.key(FLAGS.seed), *first)
    sent: list[dict[int, PyTree]] = [{} for _ in range(count)]  # outputs, by batch
    found: list[list[float]] = [[] for _ in range(count - 2)]
    for step in range(FLAGS.steps):
        state, metrics = pipe.step(state, next(source))
        for k in range(count - 2):
            outputs = state.stages[k + 1].inbox[ACTIVATION]
            sent[k] |= {n: jax.device_get(value) for n, value in outputs.items()}
            for n, (reconstructed, _) in state.stages[k].inbox[COTANGENT].items():
                true = sent[k].pop(n)
                if step >= FLAGS.steps - FLAGS.last:
                    found[k].append(distance(jax.device_get(reconstructed), true))
        shown(metrics)
    return [float(np.mean(values)) for values in found]


def distance(a: PyTree, b: PyTree) -> float:
    """|a - b| / |b| of all arrays together."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    squares = sum(float(np.sum((x.astype(np.float64) - y) ** 2)) for x, y in pairs)
    return (squares / sum(float(np.sum(y.astype(np.float64) ** 2)) for _, y in pairs)) ** 0.5


def draw(rates: Sequence[float], drifts: Sequence[Sequence[float]], staleness: list[int]) -> bytes:
    """One line per stage over the learning rates."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for k in range(len(drifts[0])):
        label = f"output of stage {k}, {staleness[k + 1]} updates later"
        axes.loglog(rates, [row[k] for row in drifts], "o-", label=label)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("relative error of the reconstruction")
    axes.set_title(f"PETRA, K = {len(drifts[0]) + 2}, {FLAGS.blocks} reversible blocks")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def numbers() -> list[float]:
    """Parses the learning rates and checks all other numbers.

    Raises:
      UsageError: a number is out of bounds.
    """
    bounds = {"num_stages": 3, "blocks": 1, "steps": 1, "last": 1, "batch_size": 1, "seed": 0}
    for name, least in bounds.items():
        if not least <= getattr(FLAGS, name) < 2**31:
            raise UsageError(f"--{name}={getattr(FLAGS, name)}: must be {least} or more")
    if FLAGS.num_stages > FLAGS.blocks + 2:
        raise UsageError(
            f"--num_stages={FLAGS.num_stages}: --blocks={FLAGS.blocks} make {FLAGS.blocks + 2} "
            "layers; choose no more stages"
        )
    enough = FLAGS.last + 2 * FLAGS.num_stages
    if FLAGS.steps < enough:
        raise UsageError(f"--steps={FLAGS.steps}: must be {enough} or more, to measure at --last")
    try:
        rates = [float(text) for text in FLAGS.learning_rates]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        given = ",".join(FLAGS.learning_rates)
        raise UsageError(f"--learning_rates={given}: give numbers above 0, such as 0.01,0.1")
    return sorted(rates)


def main() -> None:
    rates = numbers()
    workdir.check(FLAGS.workdir, overwrite=FLAGS.overwrite, files=FILES)
    setup.prepare_jax(FLAGS.num_stages)
    try:
        dataset = data.load(FLAGS.dataset, None)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--dataset={FLAGS.dataset}: cannot be read ({error})") from error
    schedule = fdg.methods.petra(FLAGS.num_stages)["schedule"]
    staleness = [schedule.staleness(k) for k in range(FLAGS.num_stages)]
    out = workdir.Workdir(FLAGS.workdir, overwrite=FLAGS.overwrite, files=FILES)
    drifts: list[list[float]] = []
    screen = Screen(FLAGS.steps * len(rates))
    done, start = itertools.count(1), time.perf_counter()

    def shown(metrics: list[fdg.Metrics]) -> None:
        step = next(done)
        speed = step * FLAGS.batch_size / (time.perf_counter() - start)
        for m in metrics:
            screen.advance(step, float(m.loss), float(m.aux["error"]), speed)

    with screen:
        for rate in rates:
            drifts.append(train(dataset, rate, shown))
            cells = "  ".join(f"{value:.2e}" for value in drifts[-1])
            screen.line(f"rate {rate:g}: {cells}")
    rows = [{"learning_rate": rate, "drift": row} for rate, row in zip(rates, drifts, strict=True)]
    flags_given = {name: FLAGS[name].value for name in GIVEN}
    out.write_bytes("drift.png", draw(rates, drifts, staleness))
    out.write_json(
        "drift.json", {**flags_given, "staleness": staleness, "rows": rows, **machine.environment()}
    )


if __name__ == "__main__":
    define_flags()
    command.run(main)
