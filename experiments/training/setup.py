"""Creates stages, schedule and pipeline of a run from its task."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any

import jax

import fdg_jax as fdg
from experiments.common import machine
from experiments.common.errors import UsageError
from experiments.common.memory import memory
from experiments.data import cache
from experiments.training import family, measured, methods
from experiments.training.config import Config, blame
from experiments.training.places import places, shared_cuts
from experiments.training.task import Task
from fdg_jax.engine.allocator import keep_freed_memory
from fdg_jax.engine.placement import stage_meshes
from fdg_jax.partition import units_of

# Numbers folded into the seed's key.
MODEL_KEY, AUGMENT_KEY = 0, 1

_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that is created before the first step."""

    task: Task[Any]
    stages: fdg.Partition
    schedule: fdg.schedule.Schedule
    pipe: fdg.Pipeline
    total_steps: int
    times: measured.Times | None  # if --partition=time

    @property
    def config(self) -> Config:
        """The settings."""
        config: Config = self.task.config
        return config


def prepare_jax(num_stages: int, devices_per_stage: int = 1, *, keep_memory: bool = True) -> None:
    """Configures JAX with one CPU device per stage, up to the cores, and a compilation cache.

    More virtual devices than cores would only wait for each other, but explicit requests for
    several per stage are respected. Freed memory is retained unless ``keep_memory=False``.
    """
    if keep_memory:
        keep_freed_memory()
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache.directory() / "compiled"))
        # Initialisation runs very many programs that compile in a few milliseconds each.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    wanted = min(num_stages, machine.cores())
    if devices_per_stage > 1:
        wanted = num_stages * devices_per_stage
    if wanted > 1 and wanted >= machine.cores():
        # Every core has its own device, so threads inside an operation would only take cores from
        # other devices. XLA reads this at its start.
        os.environ["XLA_FLAGS"] = one_thread(os.environ.get("XLA_FLAGS", ""))
    # Raises if JAX is already running, as in a notebook or a test: then existing devices are used.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", wanted)


def one_thread(flags: str) -> str:
    """XLA_FLAGS for one thread per operation, unless ``flags`` sets this."""
    return flags if _ONE_THREAD.split("=")[0] in flags else f"{flags} {_ONE_THREAD}".strip()


def make(task: Task[Any], cuts: list[int] | None = None) -> Setup:
    """Cuts the network and builds the pipeline; writes nothing.

    Args:
      task: data and network.
      cuts: the cuts of a resumed run, which replace --partition.

    Raises:
      UsageError: a setting does not fit the data or the network.
    """
    config, layers = task.config, task.layers
    number = len(units_of(layers))
    num_stages = methods.num_stages(config)
    if num_stages > number:
        raise UsageError(
            f"--num_stages={config.num_stages}: {config.model} has {number} layers that can be "
            f"split, so choose 1 to {number}"
        )
    if (needed := _bytes(task)) > memory() and jax.default_backend() == "cpu":
        raise UsageError(
            f"--{task.size}={getattr(config, task.size)}: the network's weights, gradients and "
            f"optimizer take {needed / 1e9:,.0f} GB, and this machine has {memory() / 1e9:,.0f} GB "
            "of memory; choose a smaller one"
        )
    total = config.steps or max(1, round(config.epochs * task.loader.steps_per_epoch))
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
    cuts = shared_cuts(cuts, num_stages, writer, lambda: split(task, schedule.microbatches)[0].cuts)
    stages, times = split(task, schedule.microbatches, cuts)
    rate = task.rate(total, schedule.period)
    own = family.assemble(
        config, schedule, stages, task.loss_fn, task.num_classes, images=task.images
    )
    pipe = fdg.Pipeline(
        own.stages,
        own.loss_fn,
        lambda k: task.optimizer(config, rate, schedule, k),
        schedule,
        devices=devices,
        gradient=methods.gradient(config),
        max_ahead=config.max_ahead,
        on_nonfinite=config.on_nonfinite,
        shard_optimizer=config.shard_optimizer,
        synthesizers=own.synthesizers,
        message_dtype=message_dtype(config.message_dtype),
        tie=task.tie,
    )
    if not pipe.stages[0].here:
        task.leave_out_inputs()
    return Setup(task, stages, schedule, pipe, total, times)


def split(
    task: Task[Any], microbatches: int, cuts: list[int] | None = None
) -> tuple[fdg.Partition, measured.Times | None]:
    """The network in stages according to --partition, and the layers' times if it uses them.

    Raises:
      UsageError: --partition does not fit the network.
    """
    config, layers = task.config, task.layers
    num_stages = methods.num_stages(config)
    # One stage needs no balancing and no measurements.
    cuts = [] if num_stages == 1 else config.cuts() if cuts is None else cuts
    example = task.inputs(config.batch_size)
    with blame("partition"):
        if cuts is not None:
            return fdg.partition(layers, num_stages, example, cost=cuts), None
        if config.partition == "flops":
            return fdg.partition(layers, num_stages, example, cost="flops"), None
        network = {name: getattr(config, name) for name in task.makes}
        network["num_classes"] = task.num_classes
        # A device processes its part of a micro-batch.
        part = config.batch_size // microbatches // config.devices_per_stage
        times = measured.times(layers, task.inputs(part), network)
        stages = fdg.partition(layers, num_stages, example, cost=times.seconds)
        stages.unit = "seconds"
    return stages, times


def _bytes(task: Task[Any]) -> int:
    """Bytes of weights, gradients and optimizer state, in float32."""
    params, _ = jax.eval_shape(fdg.chain(task.layers).init, jax.random.key(0), task.inputs(1))
    copies = 4 if task.config.optimizer == "adamw" else 3
    return copies * 4 * sum(leaf.size for leaf in jax.tree.leaves(params))


def message_dtype(name: str) -> str | None:
    """The argument ``message_dtype`` of `fdg_jax.Pipeline` from --message_dtype."""
    return None if name == "float32" else name


def stage_table(setup: Setup, params: list[Any]) -> list[dict[str, Any]]:
    """One row per stage: devices, layers, parameters, staleness."""
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
    """The content of config.json: settings, derived values, environment."""
    task = setup.task
    return {
        "experiment": task.config.PROGRAM,
        **dataclasses.asdict(task.config),
        **task.describe(),
        "total_steps": setup.total_steps,
        "cuts": list(setup.stages.cuts),
        "layer_costs": list(setup.stages.layer_costs),
        "cost_unit": setup.stages.unit,
        "balance": setup.stages.balance,
        "stages": table,
        **machine.environment(),
    }
