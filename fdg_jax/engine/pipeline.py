"""The training loop: one thread that dispatches asynchronously; state in, state out.

JAX dispatch is asynchronous: a call returns immediately, and each device runs its own queue. One
loop that dispatches the actions of a tick keeps all devices busy. It waits only if it is
``max_ahead`` ticks ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fdg_jax.active_mesh import no_active_mesh
from fdg_jax.engine import nonfinite
from fdg_jax.engine.arguments import (
    Optimizers,
    Synthesizers,
    check_arguments,
    losses_of,
    synthesizers_of,
)
from fdg_jax.engine.batch_check import check_structure, fit, pair
from fdg_jax.engine.dispatch import Tick
from fdg_jax.engine.encoding import message_dtype as message_dtype_of
from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.initial_state import initial_state
from fdg_jax.engine.interrupt import deferred, protect
from fdg_jax.engine.messages import MetricsList, Watch
from fdg_jax.engine.placement import stage_meshes
from fdg_jax.engine.rules import gradient_rule
from fdg_jax.engine.run_ahead import RunAhead
from fdg_jax.engine.shared_modules import warn_of_shared
from fdg_jax.engine.stages import build
from fdg_jax.engine.state import PipelineState
from fdg_jax.engine.state_check import check_state
from fdg_jax.engine.steady import SteadyTicks, compiles
from fdg_jax.engine.template import template
from fdg_jax.engine.ties import tie_stages
from fdg_jax.engine.views import Views
from fdg_jax.layer import Layer, chain, typed_key
from fdg_jax.layer_check import check_layers
from fdg_jax.schedule import Schedule
from fdg_jax.shared import plain
from fdg_jax.tie import Tie
from fdg_jax.tied_stage import tied_stages
from fdg_jax.typing import Key, LossFn, PyTree

protect(__file__)


class Pipeline(Views):
    """Trains a network cut into K stages, each on its own devices, with a schedule.

    Args:
      stages: K layers, input first, as returned by `fdg_jax.partition.partition`.
      loss_fn: ``loss_fn(outputs, labels) -> (mean loss, dict of metrics)``, or ``((sum, weight),
        dict)`` for the loss sum / weight. With micro-batches, the loss is the mean of their means,
        or the total sum over the total weight; metrics must be scalars that are means over the
        batch, or over what the weight counts. For schedules with a loss in several stages
        (`Schedule.losses`), a list of K functions, None for a stage without a loss.
      optimizer: an optax transformation used for every stage, or a function ``optimizer(k)``, or
        ``optimizer(k, layers)`` with the ``range`` of the stage's layers in the network. It sees
        the params at their position in the network (see `fdg_jax.per_layer`). Learning-rate
        schedules count the updates of the stage. ``update`` receives the extra arguments
        ``stale_params`` and ``staleness`` (see `fdg_jax.StageOptimizer`).
      schedule: a schedule for K stages.
      devices: split into K contiguous groups of equal size; if there are fewer than K, stages share
        devices. None: one device per stage, the first of ``jax.devices()``.
      gradient: the gradient rule: the weights used by a backward and the data stored per mini-batch
        in flight. "stale": weights of the forward; stores residuals and the weight version.
        "recompute_stale": the same weights and gradient with a recomputed forward; stores the
        stage's input and the weight version. "recompute": newest weights; stores the stage's input.
        "reversible": newest weights; stores nothing for layers with an inverse. "reconstruct": an
        estimate of the forward's weights; stores the stage's input. Or a `fdg_jax.GradientRule`.
      max_ahead: the number of ticks the host may run ahead of the slowest stage, >= 1.
      on_nonfinite: handling of micro-batches with a non-finite loss, gradient, output or new model
        state. "ignore": not checked. "skip": weights, optimizer state, model state and accumulated
        gradients stay unchanged; `skipped` counts them. "stop": the same, and a `step` or `drain`
        at most ``max_ahead`` ticks later raises `fdg_jax.NonFiniteError`.
      shard_optimizer: whether the optimizer state is sharded over a stage's devices instead of
        replicated; arrays that cannot be divided are replicated.
      synthesizers: for schedules with predictions (`Schedule.predicts`): a `fdg_jax.Synthesizer`
        used for each of those stages, or a function ``synthesizers(k)``.
      message_dtype: dtype of activations and cotangents between stages: ``jnp.bfloat16``,
        ``float16``, ``int8`` (with one scale per channel), or None for no conversion. `predict`
        does not convert.
      tie: an array used in two layers (`fdg_jax.tie`).
      compile: whether a full pipeline's tick is compiled as one program: True, False, or "auto", if
        stages share a device or a group. Results are the same up to rounding.

    Raises:
      ValueError: invalid or inconsistent arguments; the message names the argument and the remedy.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fdg_jax as fdg
      >>> layers = [fdg.Layer(lambda key, x: (jnp.ones(()), ()),
      ...                     lambda p, s, x, *, train, key: (p * x, s)) for _ in range(2)]
      >>> pipe = fdg.Pipeline(layers, lambda y, t: (jnp.mean((y - t) ** 2), {}),
      ...                     lambda k: optax.sgd(0.1), fdg.schedule.fdg(2))
      >>> state = pipe.init(jax.random.key(0), jnp.ones((4, 1)))
      >>> state, metrics = pipe.step(state, (jnp.ones((4, 1)), jnp.zeros((4, 1))))
      >>> metrics  # still filling
      []
      >>> state, metrics = pipe.drain(state)
      >>> metrics[0].batch, float(metrics[0].loss)
      (0, 1.0)
    """

    def __init__(
        self,
        stages: Sequence[Layer],
        loss_fn: LossFn | Sequence[LossFn | None],
        optimizer: Optimizers,
        schedule: Schedule,
        devices: Sequence[jax.Device] | None = None,
        gradient: str | GradientRule = "stale",
        max_ahead: int = 4,
        on_nonfinite: str = "ignore",
        shard_optimizer: bool = False,
        synthesizers: Synthesizers = None,
        message_dtype: DTypeLike | None = None,
        tie: Tie | None = None,
        compile: str | bool = "auto",
    ) -> None:
        stages = check_layers(stages, "stages")
        check_arguments(len(stages), schedule, max_ahead, on_nonfinite)
        rule, losses = gradient_rule(gradient), losses_of(loss_fn, schedule)
        predicting = synthesizers_of(synthesizers, schedule, rule)
        self.network = tied_stages([chain(stages)], tie)[0]
        stages, schedule = tie_stages(stages, schedule, rule, tie)
        self.schedule = schedule
        self.tie = tie
        self.rule = rule
        self.max_ahead = max_ahead
        self.on_nonfinite = on_nonfinite
        self.message_dtype = message_dtype_of(message_dtype)
        self.num_stages = len(stages)
        meshes = stage_meshes(len(stages), devices)
        rest = rule, shard_optimizer, predicting, self.message_dtype
        self.stages = build(stages, losses, optimizer, schedule, meshes, *rest)
        # The programs of the last ticks; not part of the training state.
        self._ahead = RunAhead(self.stages, schedule.microbatches, on_nonfinite == "stop")
        # Observer of dispatched programs; set by `fdg_jax.analysis.Recorder`.
        self.watch: Watch | None = None
        self._fitting: set[Any] = set()
        # The structure of the example inputs; None before there is a state.
        self._inputs: Any = None
        self.compiled = compiles(self.stages, compile)
        self._steady = SteadyTicks(self.stages, schedule) if self.compiled else None

    def __repr__(self) -> str:
        return f"<Pipeline of {self.num_stages} stages, {self.schedule.name}, {self.gradient}>"

    @property
    def gradient(self) -> str:
        """The name of the gradient rule."""
        return self.rule.name

    @no_active_mesh()
    def template(self, example: tuple[PyTree, PyTree]) -> PipelineState:
        """The structure, shapes, dtypes and placement of a state; computes nothing.

        Args:
          example: a batch ``(inputs, labels)``; only shapes and dtypes are used.

        Returns:
          A state of ``jax.ShapeDtypeStruct``; counters are numpy zeros.

        Raises:
          ValueError: a parameter has no gradient; ``example`` is not a pair.
        """
        guarded = self.on_nonfinite != "ignore"
        x, labels = pair(example, "example")
        self._inputs = jax.tree.structure(plain(x))
        return template(self.stages, self.schedule, guarded, (x, labels))

    @no_active_mesh()
    def init(
        self, key: Key, example_inputs: PyTree, example_labels: PyTree = None
    ) -> PipelineState:
        """Initialises a state with fresh parameters, each on its stage's devices.

        Args:
          key: the root of all random numbers of the run.
          example_inputs: an input with its batch axis; only shapes and dtypes are used.
          example_labels: labels of a batch, likewise. Without them the shapes of labels in flight
            are set by the first batches.

        Returns:
          A state before the first mini-batch. Its structure, shapes and dtypes are constant.

        Raises:
          ValueError: a parameter has no gradient.
        """
        typed_key(key)  # raises if it is not a key
        warn_of_shared([stage.optimizer.place.layer for stage in self.stages], self.tie)
        shapes = self.template((example_inputs, example_labels))
        if isinstance(key, jax.core.Tracer):  # jax.eval_shape(pipe.init, ...)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        example = example_inputs, example_labels
        return initial_state(self.stages, shapes, key, *example, self.record())

    def step(
        self, state: PipelineState, batch: tuple[PyTree, PyTree]
    ) -> tuple[PipelineState, MetricsList]:
        """Runs one tick with one new mini-batch. Asynchronous: returns before the devices finish.

        Args:
          state: consumed; its buffers are donated.
          batch: (inputs, labels), batch axis first, numpy or JAX arrays; see `fdg_jax.shared`.

        Returns:
          The new state, and the metrics of the mini-batches that reached a loss in this tick, as
          asynchronous arrays; empty while the pipeline fills. ``metrics["loss"]`` is the last
          value.

        Raises:
          ValueError: the batch does not fit the network, the loss or the devices; an optimizer
            requires unavailable arguments or changes the shapes of params or state. The state
            remains valid.
          ConsumedStateError: the state has been consumed.
          StageError: a stage's program failed in this tick or one of the last ``max_ahead``.
          NonFiniteError: with ``on_nonfinite="stop"``. The state remains valid.
        """
        with deferred(), no_active_mesh():
            check_state(state, self.num_stages, ())
            x, labels = pair(batch)
            check_structure(x, self._inputs, "inputs of the batch")
            fit(self.stages, self.schedule, state, x, labels, self._fitting)
            if self._steady is not None and self.watch is None:
                self._ahead.wait(self.max_ahead)
                if made := self._steady.step(state, x, labels):
                    self._ahead.add(made[2])
                    return made[0], made[1]
            check_state(state, self.num_stages)
            tick = Tick(self.stages, self.schedule, state, self.watch)
            tick.enter(x, labels)
            self._ahead.wait(self.max_ahead)
            tick.run(self.schedule.tick(tick.batch - tick.origin))
            self._ahead.add(tick.tokens())
            return tick.state(tick.batch + 1, tick.origin), tick.metrics

    def drain(self, state: PipelineState) -> tuple[PipelineState, MetricsList]:
        """Applies all gradients in flight; no new mini-batch enters.

        An incomplete accumulation is applied as the mean of its gradients. A subsequent `step`
        fills the pipeline again.

        Args:
          state: consumed.

        Returns:
          The new state without mini-batches in flight, and the metrics of the last mini-batches in
          order.
        """
        with deferred(), no_active_mesh():
            check_state(state, self.num_stages)
            tick = Tick(self.stages, self.schedule, state, self.watch)
            t = batches = tick.batch - tick.origin
            # No batch is in flight for more ticks than stages times batches held per stage.
            longest = self.num_stages * (self.schedule.in_flight(0) + self.schedule.period)
            while any(s.flights or any(s.inbox.values()) for s in tick.stages):
                if t > batches + longest:
                    raise ValueError(
                        f"state: holds batches that schedule {self.schedule.name} does not know "
                        "of; drain it with the pipeline that made it"
                    )
                self._ahead.wait(self.max_ahead)
                tick.run(self.schedule.tick(t, batches))
                self._ahead.add(tick.tokens())
                t += 1
            tick.finish()
            return tick.state(tick.batch, tick.batch), tick.metrics

    def check(self) -> None:
        """Waits for all dispatched programs; raises as `step` does."""
        self._ahead.wait(0)

    @property
    def idle(self) -> bool:
        """Whether all dispatched programs are known to have finished."""
        return self._ahead.idle

    def record(self) -> np.ndarray | None:
        """A stage's record without failures, or None if non-finite values are ignored."""
        return None if self.on_nonfinite == "ignore" else nonfinite.fresh()
