"""The contenders of a benchmark: training loops that run in turns."""

from __future__ import annotations

import abc
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import fdg_jax as fdg
from experiments.benchmarking.workload import ONE_DEVICE, Workload, gradient
from experiments.training import family
from experiments.training.setup import message_dtype
from experiments.training.task import loss_fn
from fdg_jax.checkpoint import Checkpointer
from fdg_jax.engine.placement import BATCH_AXIS, stage_meshes
from fdg_jax.layer import batch_key
from fdg_jax.schedule import Schedule
from fdg_jax.typing import PyTree


class Contender(abc.ABC):
    """A training loop that keeps its state between turns.

    Attributes:
      name: as in --contenders.
      about: a short description.
      devices: number of devices.
      stages: number of stages.
      processes: ids of its other processes.
    """

    name: str
    about: str
    devices: int
    stages: int = 1
    processes: tuple[int, ...] = ()

    @abc.abstractmethod
    def turn(self, steps: int) -> float:
        """Trains, waits for the devices, and returns the seconds."""

    @property
    @abc.abstractmethod
    def loss(self) -> float:
        """The loss of the last mini-batch that reached it."""

    @property
    def fill(self) -> int:
        """Steps until the pipeline is in steady state."""
        return 1

    def close(self) -> None:  # noqa: B027 - most have nothing to stop
        """Stops what it has started."""


class TrainState(NamedTuple):
    """The state of a plain training step."""

    params: PyTree
    model_state: PyTree
    opt_state: optax.OptState
    number: jax.Array


class Plain(Contender):
    """One jitted step of the whole network with donated state: a loop without the engine.

    Args:
      name: as in --contenders.
      work: the workload.
      devices: one, or several that share every batch.
    """

    def __init__(self, name: str, work: Workload, devices: list[jax.Device]) -> None:
        self.name, self.devices = name, len(devices)
        self.about = "one jitted step" + (", batch sharded" if len(devices) > 1 else "")
        layers = work.network(fast_derivatives=name != "backprop_xla")
        layer, optimizer, key = fdg.chain(layers), work.optimizer(), work.key

        def step(
            state: TrainState, inputs: jax.Array, labels: jax.Array
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            def loss(params: PyTree) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
                noise = batch_key(key, state.number)
                y, new = layer.apply(params, state.model_state, inputs, train=True, key=noise)
                value, metrics = loss_fn(y, labels)
                return value, (new, {**metrics, "loss": value})

            grads, (model_state, metrics) = jax.grad(loss, has_aux=True)(state.params)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TrainState(params, model_state, opt_state, state.number + 1), metrics

        with jax.default_device(devices[0]):
            params, model_state = layer.init(key, jnp.zeros(work.example.shape, work.example.dtype))
            opt_state = jax.jit(optimizer.init)(params)
            state = TrainState(params, model_state, opt_state, jnp.zeros((), jnp.int32))
        if len(devices) == 1:
            self.step = jax.jit(step, donate_argnums=0)
            whole: Any = devices[0]
            parts: Any = devices[0]
        else:
            mesh = stage_meshes(1, devices)[0]
            whole = NamedSharding(mesh, PartitionSpec())
            parts = NamedSharding(mesh, PartitionSpec(BATCH_AXIS))
            self.step = jax.jit(step, donate_argnums=0, out_shardings=whole)
        # A copy, since the caller may hold initial values, which must not be donated.
        self.state = jax.device_put(jax.tree.map(jnp.copy, state), whole)
        self.batch = jax.device_put((work.inputs, work.labels), parts)
        self.metrics: dict[str, jax.Array] = {}

    def turn(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.state, self.metrics = self.step(self.state, *self.batch)
        jax.block_until_ready((self.state, self.metrics))
        return time.perf_counter() - start

    @property
    def loss(self) -> float:
        return float(self.metrics["loss"])


class Piped(Contender):
    """A schedule run by the engine; stays filled between turns.

    Args:
      name: as in --contenders.
      work: the workload.
      schedule: the schedule.
      devices: its devices; shared by stages if there are fewer.
      choice: the gradient rule.
      on_nonfinite: as in `fdg_jax.Pipeline`.
      compiled: whether stages that share a device are compiled into one program per tick.
    """

    def __init__(
        self,
        name: str,
        work: Workload,
        schedule: Schedule,
        devices: list[jax.Device],
        choice: str = "stale",
        on_nonfinite: str = "ignore",
        compiled: bool = True,
    ) -> None:
        self.name, self.schedule, self.gradient = name, schedule, choice
        self.stages = schedule.num_stages
        self.devices = min(len(devices), self.stages)
        self.about = f"{schedule.name}, {self.stages} stages, {choice}"
        if schedule.microbatches > 1:
            self.about += f", {schedule.microbatches} micro-batches"
        if on_nonfinite != "ignore":
            self.about += ", looks at what is not finite"
        if work.settings.message_dtype != "float32":
            self.about += f", messages in {work.settings.message_dtype}"
        self.split = work.split(self.stages)
        beside = family.assemble(
            work.settings.family,
            schedule,
            self.split,
            loss_fn,
            work.classes,
            images=work.inputs.ndim == 4,
        )
        self.pipe = fdg.Pipeline(
            beside.stages,
            beside.loss_fn,
            lambda k: work.optimizer(name, (schedule, k)),
            schedule,
            devices=devices[: self.devices],
            gradient=choice,
            on_nonfinite=on_nonfinite,
            synthesizers=beside.synthesizers,
            compile="auto" if compiled else False,
            message_dtype=message_dtype(work.settings.message_dtype),
        )
        if self.stages > 1 and self.devices == 1:
            self.about += ", compiled ticks" if self.pipe.compiled else ", dispatched ticks"
        self.state = self.pipe.init(work.key, work.example, work.labels)
        first, last = self.pipe.stages[0], self.pipe.stages[-1]
        self.batch = (
            jax.device_put(work.inputs, first.sharded),
            jax.device_put(work.labels, last.sharded),
        )
        self.metrics: fdg.Metrics | None = None

    @property
    def fill(self) -> int:
        # Until the first gradient of stage 0, and until every period has been compiled.
        return 2 * self.stages + 2 * self.schedule.period

    def turn(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.pipe.step(self.state, self.batch)
            self.metrics = metrics[-1] if metrics else self.metrics
        jax.block_until_ready((self.state, self.metrics))
        return time.perf_counter() - start

    @property
    def loss(self) -> float:
        return float(self.metrics.loss) if self.metrics else float("nan")


class Saving(Piped):
    """`Piped` with a checkpoint in the middle of every `EVERY` steps, in a temporary folder."""

    EVERY = 50

    def __init__(
        self, name: str, work: Workload, schedule: Schedule, devices: list[jax.Device]
    ) -> None:
        super().__init__(name, work, schedule, devices)
        self.about += f", saved every {self.EVERY} steps"
        self.folder = tempfile.TemporaryDirectory()
        self.checkpointer = Checkpointer(self.folder.name, self.pipe)
        self.count = 0

    def turn(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.pipe.step(self.state, self.batch)
            self.metrics = metrics[-1] if metrics else self.metrics
            self.count += 1
            if self.count % self.EVERY == self.EVERY // 2:
                self.checkpointer.save(self.state, self.count)
        jax.block_until_ready((self.state, self.metrics))
        seconds = time.perf_counter() - start
        self.checkpointer.wait()  # so as not to disturb the next contender's turn
        return seconds

    def close(self) -> None:
        self.checkpointer.close()
        self.folder.cleanup()


def make(name: str, work: Workload) -> Contender:
    """Creates a contender that runs in this process."""
    count = work.settings.num_stages
    devices = jax.devices()[:count]
    if name in ("backprop", "backprop_xla"):
        return Plain(name, work, devices[:1])
    if name == "data_parallel":
        return Plain(name, work, devices)
    if name == "engine_k1":
        return Piped(name, work, fdg.schedule.fdg(1), devices[:1])
    if single := ONE_DEVICE.fullmatch(name):
        schedule = fdg.schedule.fdg(int(single[1]))
        return Piped(name, work, schedule, devices[:1], compiled=single[2] is None)
    schedule = work.settings.schedule(name)
    if name == "fdg_saving":
        return Saving(name, work, schedule, devices)
    look = "stop" if name == "fdg_guarded" else "ignore"
    return Piped(name, work, schedule, devices, gradient(name), look)
