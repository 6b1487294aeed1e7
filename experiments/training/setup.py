"""From settings to what a run needs: data, stages, schedule, optimizer, pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax

import fdg_jax as fdg
from experiments import data
from experiments.common import machine
from experiments.common.errors import UsageError
from experiments.common.memory import memory
from experiments.training import family, measured, methods, remedies
from experiments.training.config import Config, blame
from experiments.training.places import places, shared_cuts, without_images
from fdg_jax.engine.allocator import keep_freed_memory
from fdg_jax.engine.placement import stage_meshes
from fdg_jax.layer import Layer
from fdg_jax.partition import units_of

# Which branch of the seed's key is whose.
MODEL_KEY, AUGMENT_KEY = 0, 1

_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"

# Images held out and subsets of train are the same whatever the seed: seeds repeat the training.
SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that is made from a `Config` before the first step."""

    config: Config
    dataset: data.Dataset
    loader: data.Loader
    stages: fdg.Partition
    schedule: fdg.schedule.Schedule
    pipe: fdg.Pipeline
    total_steps: int
    split: str  # the name of the split that errors are measured on
    times: measured.Times | None  # what the split into stages follows from, where it is time


def prepare_jax(num_stages: int, devices_per_stage: int = 1, *, keep_memory: bool = True) -> None:
    """Asks JAX for one CPU device per stage, up to the cores, and for a cache of what it compiles.

    More virtual devices than cores would only make them wait for one another; who asks for several
    a stage gets them. Memory that a step frees is kept for the next one, unless told otherwise.
    """
    if keep_memory:
        keep_freed_memory()
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(data.cache.directory() / "compiled"))
        # Initial weights are drawn by very many programs of a few milliseconds each.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    wanted = min(num_stages, machine.cores())
    if devices_per_stage > 1:
        wanted = num_stages * devices_per_stage
    if wanted > 1 and wanted >= machine.cores():
        # Every core has a device of its own: threads inside an operation would only take cores from
        # other devices. XLA reads this when it starts.
        os.environ["XLA_FLAGS"] = one_thread(os.environ.get("XLA_FLAGS", ""))
    # JAX refuses once it is running, in a notebook or a test: take the devices there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", wanted)


def one_thread(flags: str) -> str:
    """XLA_FLAGS with which an operation keeps to one thread, unless ``flags`` says otherwise."""
    return flags if _ONE_THREAD.split("=")[0] in flags else f"{flags} {_ONE_THREAD}".strip()


def make(config: Config, cuts: list[int] | None = None) -> Setup:
    """Loads the data and builds the pipeline; writes nothing.

    Args:
      config: the settings.
      cuts: those of the run that goes on, whatever --partition would find today.

    Raises:
      UsageError: a setting does not fit the data or the network.
    """
    try:
        dataset = data.load(
            config.dataset,
            config.data_dir,
            validation_size=config.validation_size,
            train_size=config.train_size,
            seed=SPLIT_SEED,
        )
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--dataset={config.dataset}: cannot be read ({error})") from error
    loader = data.Loader(
        dataset.train_images, dataset.train_labels, config.batch_size, seed=config.seed
    )
    height, width, channels = dataset.image_shape
    if config.crop_padding > max(height, width):
        raise UsageError(
            f"--crop_padding={config.crop_padding}: must not exceed the image, {height}x{width}; "
            "4 is usual"
        )
    with blame("model"):
        layers = network(config, dataset.num_classes, channels)
    number = len(units_of(layers))
    num_stages = methods.num_stages(config)
    if num_stages > number:
        raise UsageError(
            f"--num_stages={config.num_stages}: {config.model} has {number} layers that can be "
            f"split, so choose 1 to {number}"
        )
    if (needed := _bytes(layers, dataset)) > memory() and jax.default_backend() == "cpu":
        raise UsageError(
            f"--model={config.model}: its weights, gradients and momentum take "
            f"{needed / 1e9:,.0f} GB, and this machine has {memory() / 1e9:,.0f} GB of memory; "
            "choose a smaller one"
        )
    total = config.steps or config.epochs * loader.steps_per_epoch
    if total >= 2**31:
        raise UsageError(
            f"--epochs={config.epochs}: makes {total:,} steps, and no more than {2**31 - 1:,} are "
            "counted; choose less, or give --steps"
        )
    schedule = methods.schedule(config)
    if schedule.period > total:
        raise UsageError(
            f"--accumulate={schedule.period}: must not exceed the run's {total} steps; choose less"
        )
    devices = places(config, num_stages, schedule.microbatches)
    writer = stage_meshes(num_stages, devices)[-1].devices.flat[0].process_index
    cuts = shared_cuts(
        cuts,
        num_stages,
        writer,
        lambda: split(config, layers, dataset, schedule.microbatches)[0].cuts,
    )
    stages, times = split(config, layers, dataset, schedule.microbatches, cuts)
    rate = learning_rate(config, loader.steps_per_epoch / schedule.period, total / schedule.period)
    own = family.assemble(config, schedule, stages, loss_fn, dataset.num_classes, images=True)
    pipe = fdg.Pipeline(
        own.stages,
        own.loss_fn,
        lambda k: optimizer(config, rate, schedule, k),
        schedule,
        devices=devices,
        gradient=methods.gradient(config),
        max_ahead=config.max_ahead,
        on_nonfinite=config.on_nonfinite,
        shard_optimizer=config.shard_optimizer,
        synthesizers=own.synthesizers,
        message_dtype=message_dtype(config.message_dtype),
    )
    if not pipe.stages[0].here:
        dataset = without_images(dataset)
        loader = data.Loader(
            dataset.train_images, dataset.train_labels, config.batch_size, seed=config.seed
        )
    tested = "validation" if config.validation_size else "test"
    return Setup(config, dataset, loader, stages, schedule, pipe, total, tested, times)


def network(config: Config, num_classes: int, channels: int) -> list[Layer]:
    """The network that the settings name, input first.

    Raises:
      ValueError: there is none such.
    """
    unroll = {"auto": None, "yes": True, "no": False}[config.unroll]
    how = compute(config.dtype, config.fast_derivatives)
    return fdg.models.create(config.model, num_classes, channels, unroll, how, config.dropout)


def split(
    config: Config,
    layers: list[Layer],
    dataset: data.Dataset,
    microbatches: int,
    cuts: list[int] | None = None,
) -> tuple[fdg.Partition, measured.Times | None]:
    """The network in stages as --partition says, and the layers' times if that takes them.

    Raises:
      UsageError: --partition does not fit the network.
    """
    num_stages = methods.num_stages(config)
    # One stage leaves nothing to balance, and so nothing to measure.
    cuts = [] if num_stages == 1 else config.cuts() if cuts is None else cuts
    height, width, channels = dataset.image_shape

    def images(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, height, width, channels), jnp.float32)

    example = images(config.batch_size)
    with blame("partition"):
        if cuts is not None:
            return fdg.partition(layers, num_stages, example, cost=cuts), None
        if config.partition == "flops":
            return fdg.partition(layers, num_stages, example, cost="flops"), None
        network = {
            "model": config.model,
            "num_classes": dataset.num_classes,
            "channels": channels,
            "dropout": config.dropout,
            "unroll": config.unroll,
            "dtype": config.dtype,
            "fast_derivatives": config.fast_derivatives,
        }
        # A device sees its part of a micro-batch.
        part = config.batch_size // microbatches // config.devices_per_stage
        times = measured.times(layers, images(part), network)
        stages = fdg.partition(layers, num_stages, example, cost=times.seconds)
        stages.unit = "seconds"
    return stages, times


def _bytes(layers: list[Layer], dataset: data.Dataset) -> int:
    """Of weights, gradients and momentum, in float32."""
    image = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
    params, _ = jax.eval_shape(fdg.chain(layers).init, jax.random.key(0), image)
    return 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(params))


def compute(dtype: str, fast_derivatives: bool) -> fdg.models.Compute:
    """How the network is computed, from the flags."""
    return fdg.models.Compute(None if dtype == "float32" else jnp.dtype(dtype), fast_derivatives)


def message_dtype(name: str) -> str | None:
    """--message_dtype as `fdg_jax.Pipeline` takes it."""
    return None if name == "float32" else name


def loss_fn(outputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy, and the fraction of wrong answers."""
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()
    return loss, {"error": jnp.mean(jnp.argmax(outputs, axis=-1) != labels)}


def learning_rate(config: Config, per_epoch: float, total: float) -> optax.Schedule:
    """The rate of each update of a stage, from updates per epoch and in all."""
    if config.lr_schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, math.ceil(total))
    if config.lr_schedule == "constant":
        return optax.constant_schedule(config.learning_rate)
    boundaries: dict[int, float] = {}
    for epoch in config.lr_milestones:
        update = round(min(epoch * per_epoch, total))  # those beyond the end change nothing
        boundaries[update] = boundaries.get(update, 1.0) * config.lr_decay
    return optax.piecewise_constant_schedule(config.learning_rate, boundaries)


def optimizer(
    config: Config, rate: optax.Schedule, schedule: fdg.schedule.Schedule, stage: int
) -> optax.GradientTransformation:
    """A stage's optimizer: SGD or Muon, shrunk, as --remedy says."""
    own = remedies.StageSettings(
        rate,
        (schedule, stage),
        schedule.period,
        config.momentum,
        config.weight_decay,
        methods.beta(config),
        hops=schedule.num_stages - 1 - stage,
        exclude="dense",  # the last layer
    )
    return remedies.optimizer(config, own)


def stage_table(setup: Setup, params: list[Any]) -> list[dict[str, Any]]:
    """One row a stage: where it is, what it holds, how late its gradients are."""
    edges = (0, *setup.stages.cuts, setup.stages.layers)
    rows = []
    for k, stage in enumerate(setup.pipe.stages):
        rows.append(
            {
                "stage": k,
                "devices": [str(d) for d in stage.mesh.devices.flat],
                "layers": [edges[k], edges[k + 1]],
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(params[k])),
                "cost": setup.stages.costs[k],
                "delay": setup.schedule.delay(k),
                "staleness": setup.schedule.staleness(k),
                "in_flight": setup.schedule.in_flight(k),
                "shrink": methods.beta(setup.config) ** (len(setup.stages) - 1 - k),
            }
        )
    return rows


def describe(setup: Setup, table: list[dict[str, Any]]) -> dict[str, Any]:
    """What stands in config.json: the settings, what follows from them, where it runs."""
    dataset = setup.dataset
    return {
        **dataclasses.asdict(setup.config),
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "image_shape": list(dataset.image_shape),
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
        "total_steps": setup.total_steps,
        "cuts": list(setup.stages.cuts),
        "layer_costs": list(setup.stages.layer_costs),
        "cost_unit": setup.stages.unit,
        "balance": setup.stages.balance,
        "stages": table,
        **machine.environment(),
    }
