"""The host-side asynchronous scheduler: one thread, state in, state out.

JAX dispatch is asynchronous: each call returns at once, each device works through its own queue,
and a program starts when its inputs are there. So one loop that dispatches the actions of a tick
keeps all devices busy. Nothing in it waits for a device, except that it stays at most ``max_ahead``
ticks ahead of the slowest.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdg_jax.engine import nonfinite
from fdg_jax.engine.batch_check import check_optimizer, fit, signature
from fdg_jax.engine.dispatch import Done, Metrics, Tick, Watch, failure, send
from fdg_jax.engine.gradient_rule import GradientRule, gradient_rule
from fdg_jax.engine.interrupt import deferred
from fdg_jax.engine.placement import gather, put, stage_meshes
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState, StageState
from fdg_jax.engine.template import template
from fdg_jax.errors import ConsumedStateError, NonFiniteError
from fdg_jax.layer import Layer, output_of, typed_key
from fdg_jax.optim import StageOptimizer
from fdg_jax.schedule import Schedule
from fdg_jax.schedule.action import COTANGENT
from fdg_jax.typing import Key, LossFn, PyTree

Optimizer: TypeAlias = optax.GradientTransformation | StageOptimizer


class Pipeline:
    """Trains a network cut into K stages, each on its own devices, by a schedule.

    Args:
      stages: K layers, input first; `partition` makes them.
      loss_fn: ``loss_fn(outputs, labels) -> (mean loss, dict of metrics)``; where a schedule
        divides mini-batches, metrics must be scalars and means over the batch, as the loss is.
        Where stages have losses of their own (`Schedule.losses`), K functions, None for a stage
        without.
      optimizer: an optax transformation for every stage, or ``optimizer(k)``, that of stage k. A
        learning-rate schedule in it counts the stage's own updates. Its ``update`` gets the extra
        arguments ``stale_params`` and ``staleness`` (see `StageOptimizer`).
      schedule: who does what when, for K stages.
      devices: K contiguous groups of equal size are made of them; fewer devices than stages are
        shared. None: one device per stage, the first of ``jax.devices()``.
      gradient: the gradient rule: which weights a backward uses, and what a batch in flight keeps
        for it. "stale": those of the batch's own forward; its residuals and that weight version.
        "recompute_stale": the same weights and the same gradient, but the forward is run again; the
        stage's input and that weight version. "recompute": the newest weights; the stage's input.
        Or a `GradientRule`.
      max_ahead: how many ticks the host may be ahead of the slowest stage, >= 1.
      on_nonfinite: what becomes of a micro-batch whose loss, gradient, output or new model state is
        not finite. "ignore": not checked. "skip": the stage leaves it out: weights, optimizer
        state and model state stay as they are, and an accumulation goes on without it; `skipped`
        counts. "stop": the same, and `step` and `drain` raise a `NonFiniteError` as soon as the
        host knows of it without waiting, which is at most ``max_ahead`` ticks later.
      shard_optimizer: whether the devices of a stage share out its optimizer's state, where they
        would each have all of it; arrays that they do not divide stay whole in each.

    Raises:
      ValueError: arguments that do not fit together; the message names the argument and the remedy.

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
        optimizer: Optimizer | Callable[[int], Optimizer],
        schedule: Schedule,
        devices: Sequence[jax.Device] | None = None,
        gradient: str | GradientRule = "stale",
        max_ahead: int = 4,
        on_nonfinite: str = "ignore",
        shard_optimizer: bool = False,
    ) -> None:
        stages = list(stages)
        if len(stages) != schedule.num_stages:
            raise ValueError(
                f"schedule: {schedule.name} is made for {schedule.num_stages} stages, but stages "
                f"has {len(stages)}; make both with the same number"
            )
        rule = gradient_rule(gradient)
        if on_nonfinite not in nonfinite.ON_NONFINITE:
            raise ValueError(
                f"on_nonfinite={on_nonfinite!r}: allowed are {', '.join(nonfinite.ON_NONFINITE)}"
            )
        losses = _losses(loss_fn, schedule)
        if not isinstance(max_ahead, int) or max_ahead < 1:
            raise ValueError(f"max_ahead={max_ahead}: the host must be allowed at least one tick")
        # A schedule that is no pipeline says so now, and not in the middle of a run.
        schedule.in_flight(0)
        self.schedule = schedule
        self.rule = rule
        self.max_ahead = max_ahead
        self.on_nonfinite = on_nonfinite
        self.num_stages = len(stages)
        self.stages: list[Stage] = []
        sends = any(name == COTANGENT for kind in schedule.kinds for name, hop in kind.gives if hop)
        index = 0
        for k, mesh in enumerate(stage_meshes(len(stages), devices)):
            self.stages.append(
                Stage(
                    stages[k].at(index),
                    _optimizer(optimizer, k),
                    mesh,
                    start=index,
                    rule=rule,
                    loss_fn=losses[k],
                    last=k == len(stages) - 1,
                    sends=sends and k > 0,
                    shard_optimizer=shard_optimizer,
                )
            )
            index += stages[k].size
        # The programs of each of the last ticks, with their tokens; no part of the training state.
        self._ticks: collections.deque[list[Done]] = collections.deque()
        # Who sees what is dispatched; `fdg_jax.analysis.Recorder` sets it.
        self.watch: Watch | None = None
        self._fitting: set[Any] = set()

    @property
    def gradient(self) -> str:
        """The name of the gradient rule."""
        return self.rule.name

    def template(self, example: tuple[PyTree, PyTree]) -> PipelineState:
        """The structure, shapes, dtypes and places of a state; nothing is computed.

        Args:
          example: a batch ``(inputs, labels)``; only shapes and dtypes are looked at.

        Returns:
          A state of ``jax.ShapeDtypeStruct``, but for its counters, which are numpy zeros.

        Raises:
          ValueError: an optimizer does not keep the shapes of params and state.
        """
        guarded = self.on_nonfinite != "ignore"
        return template(self.stages, self.schedule, self.rule, guarded, example)

    def init(
        self, key: Key, example_inputs: PyTree, example_labels: PyTree = None
    ) -> PipelineState:
        """A state with fresh parameters, each on its own stage's devices.

        Args:
          key: root of every random number of the run.
          example_inputs: an input with its batch axis; only shapes and dtypes are looked at.
          example_labels: labels of the batch, likewise. Without them the places of labels in flight
            get their shapes with the first batches, and not before.

        Returns:
          A state in which no batch has entered yet; its structure, shapes and dtypes stay.

        Raises:
          ValueError: an optimizer fails, or changes the shapes of params or state.
        """
        shapes = self.template((example_inputs, example_labels))
        sums = self._accumulating()
        for k, (stage, own) in enumerate(zip(self.stages, shapes.stages, strict=True)):
            check_optimizer(stage, k, own.params, own.opt_state, k in sums)
        if isinstance(key, jax.core.Tracer):  # jax.eval_shape(pipe.init, ...)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        with jax.transfer_guard("allow"):
            key = jnp.copy(typed_key(key))
        states: list[StageState] = []
        x = jax.eval_shape(lambda v: v, example_inputs)
        for stage, own in zip(self.stages, shapes.stages, strict=True):
            params, model_state, opt_state = stage.init(key, x)
            own_key, number = put((key, np.zeros((), np.int32)), stage.replicated)
            states.append(
                self.blank(len(states), own)._replace(
                    params=params,
                    model_state=model_state,
                    opt_state=opt_state,
                    key=own_key,
                    number=number,
                    record=put(self.record(), stage.replicated),
                )
            )
            x = output_of(stage.layer, params, model_state, x)
        return PipelineState(shapes.tick, shapes.origin, key, tuple(states))

    def blank(self, k: int, own: StageState) -> StageState:
        """A stage's part of a template with empty slots and no gradients; the rest is as it was."""
        stage = self.stages[k]
        return own._replace(
            gradient=stage.zeros(own.gradient),
            flights=stage.zeros_of(own.flights),
            versions=stage.zeros_of(own.versions),
            inbox={port: stage.zeros_of(slots) for port, slots in own.inbox.items()},
        )

    def step(
        self, state: PipelineState, batch: tuple[PyTree, PyTree]
    ) -> tuple[PipelineState, list[Metrics]]:
        """One tick: one mini-batch enters. Returns at once, before the devices are done.

        Args:
          state: consumed; its buffers may be donated.
          batch: (inputs, labels), batch axis first, numpy or JAX arrays.

        Returns:
          The new state, and the metrics of the batches that reached a loss in this tick, as arrays
          that may not be computed yet; empty while filling.

        Raises:
          ValueError: the batch does not fit the network, the loss, or the devices; the state is
            whole then.
          ConsumedStateError: the state was used before.
          StageError: a stage's program failed, in this tick or in one of the last ``max_ahead``.
          NonFiniteError: with ``on_nonfinite="stop"``; the state is whole then.
        """
        with deferred():
            self._check(state, *batch)
            tick = self._tick(state)
            tick.enter(*batch)
            self._wait()
            tick.run(self.schedule.tick(tick.batch - tick.origin))
            self._ticks.append(tick.tokens())
            return tick.state(tick.batch + 1, tick.origin), tick.metrics

    def drain(self, state: PipelineState) -> tuple[PipelineState, list[Metrics]]:
        """Applies every gradient still in flight; no new batch enters.

        What is left of an accumulation is applied as the mean of what it holds. `step` after it
        fills the pipeline again.

        Args:
          state: consumed.

        Returns:
          The new state, with nothing in flight, and the metrics of the batches that reached the
          loss, in order.
        """
        with deferred():
            tick = self._tick(state)
            t = batches = tick.batch - tick.origin
            # Nothing stays in flight longer than a stage can hold batches, times the stages.
            longest = self.num_stages * (self.schedule.in_flight(0) + self.schedule.period)
            while any(s.flights or any(s.inbox.values()) for s in tick.stages):
                if t > batches + longest:
                    raise ValueError(
                        f"state: holds batches that schedule {self.schedule.name} does not know "
                        "of; drain it with the pipeline that made it"
                    )
                self._wait()
                tick.run(self.schedule.tick(t, batches))
                self._ticks.append(tick.tokens())
                t += 1
            tick.finish()
            return tick.state(tick.batch, tick.batch), tick.metrics

    def predict(self, state: PipelineState, x: PyTree) -> PyTree:
        """Outputs in evaluation mode at the true weights, through the stages where they are.

        Args:
          state: any state; it is not consumed.
          x: inputs, batch axis first.

        Returns:
          The network's outputs, on the last stage's devices, perhaps not computed yet.

        Raises:
          ValueError: the batch does not divide over a stage's devices.
        """
        for stage, own in zip(self.stages, state.stages, strict=True):
            x = send(x, stage)
            with _naming_consumed():
                x = stage.evaluate(own.params, own.opt_state, own.model_state, x)
        return x

    def params(self, state: PipelineState) -> list[PyTree]:
        """The parameters of each stage, where they are, as its next forward uses them.

        Args:
          state: any state; it is not consumed.

        Returns:
          K pytrees, valid until the next step; predictions of the weights where the optimizer
          makes them such (`fdg_jax.predict_weights`).
        """
        return [stage.params for stage in state.stages]

    def true_params(self, state: PipelineState) -> list[PyTree]:
        """The weights of each stage, to evaluate and to keep: `params` without prediction.

        Args:
          state: any state; it is not consumed.

        Returns:
          K pytrees, on the stages' devices, valid until the next step.
        """
        with _naming_consumed():
            return [
                stage.true_params(own.params, own.opt_state)[0]
                for stage, own in zip(self.stages, state.stages, strict=True)
            ]

    def skipped(self, state: PipelineState) -> list[int]:
        """How many micro-batches each stage skipped, since they were not finite.

        Args:
          state: any state; this waits for it, and every process calls it.

        Returns:
          K counts; zeros where it was not checked.
        """
        if self.on_nonfinite == "ignore":
            return [0] * self.num_stages
        counts = [
            int(jax.device_get(own.record)[nonfinite.SKIPPED]) if stage.here else 0
            for stage, own in zip(self.stages, state.stages, strict=True)
        ]
        return [int(n) for n in gather(np.array(counts, np.int32)).max(axis=0)]

    def check(self) -> None:
        """Waits for all that has been dispatched.

        Raises:
          StageError, NonFiniteError: as in `step`.
        """
        while self._ticks:
            self._wait(1)

    @property
    def idle(self) -> bool:
        """Whether it is known that nothing of what was dispatched still runs."""
        return not self._ticks

    def record(self) -> np.ndarray | None:
        """A stage's record in which nothing has gone wrong, or None where it is not checked."""
        return None if self.on_nonfinite == "ignore" else nonfinite.fresh()

    def _accumulating(self) -> set[int]:
        """The stages in which an update may have several gradients."""
        begin, kinds = self.schedule.start + self.schedule.fill, self.schedule.kind_of
        found, pending = set(), [0] * self.num_stages
        for t in range(begin, begin + 2 * self.schedule.period + 2):
            for action in self.schedule.tick(t):
                k, gradient = action.stage, kinds[action.kind].gradient
                if gradient == "adds":
                    pending[k] += 1
                    found |= {k} if pending[k] > 1 else set()
                elif gradient == "applies":
                    pending[k] = 0
        return found

    def _check(self, state: PipelineState, x: PyTree, labels: PyTree) -> None:
        """Tries every new shape of a batch before anything is dispatched."""
        shapes = signature(x), signature(labels)
        if shapes not in self._fitting:
            fit(self.stages, self.schedule.microbatches, state, x, labels)
            self._fitting.add(shapes)

    def _tick(self, state: PipelineState) -> Tick:
        return Tick(self.stages, self.schedule, self.rule, state, self.watch)

    def _wait(self, allowed: int | None = None) -> None:
        """Lets fewer than ``allowed`` ticks be under way, and looks at those that have ended."""
        if len(self._ticks) < (allowed or self.max_ahead):
            return
        done = [program for program in self._ticks.popleft() if self.stages[program.stage].here]
        for program in done:
            try:
                jax.block_until_ready(program.token)
            except Exception as error:
                self._ticks.clear()
                k, what, batch, _ = program
                raise failure(self.stages, k, what, batch, error) from error
        if self.on_nonfinite == "stop":
            # They have ended: fetching their records waits for nothing.
            records = jax.device_get([program.token for program in done])
            for program, record in zip(done, records, strict=True):
                if max(record[[nonfinite.FORWARD, nonfinite.BACKWARD]]) >= 0:
                    self._ticks.clear()
                    raise self._nonfinite(program, record)

    def _nonfinite(self, program: Done, record: np.ndarray) -> NonFiniteError:
        k, stage = program.stage, self.stages[program.stage]
        what = "output or model state"
        if stage.loss_fn is not None:
            what = "loss or model state"
        n = record[nonfinite.FORWARD]
        if n < 0:
            what, n = "gradient or update", record[nonfinite.BACKWARD]
        batch = int(n) // self.schedule.microbatches
        return NonFiniteError(
            f"mini-batch {batch}: {what} of stage {k} ({stage.layers}) is not finite", k, batch
        )


def _losses(loss_fn: LossFn | Sequence[LossFn | None], schedule: Schedule) -> list[LossFn | None]:
    """The loss of every stage that has one, None for the others."""
    if callable(loss_fn):
        if len(schedule.losses) > 1:
            raise ValueError(
                f"loss_fn: schedule {schedule.name} has losses in stages "
                f"{', '.join(map(str, schedule.losses))}; give a list of {schedule.num_stages}"
            )
        return [loss_fn if k in schedule.losses else None for k in range(schedule.num_stages)]
    given = list(loss_fn)
    there = tuple(k for k, one in enumerate(given) if one is not None)
    if len(given) != schedule.num_stages or there != tuple(sorted(schedule.losses)):
        raise ValueError(
            f"loss_fn: a list of {len(given)} with losses in stages {there}; schedule "
            f"{schedule.name} needs {schedule.num_stages}, with losses in {schedule.losses} and "
            "None elsewhere"
        )
    return given


def _optimizer(given: Optimizer | Callable[[int], Optimizer], k: int) -> StageOptimizer:
    """The optimizer of stage k, out of either form."""
    if isinstance(given, (optax.GradientTransformation, StageOptimizer)):
        return StageOptimizer.of(given)
    if not callable(given):
        raise ValueError(
            f"optimizer: {given!r} is neither an optax transformation nor a function of the stage; "
            "give optax.sgd(0.1), or lambda k: optax.sgd(0.1)"
        )
    return StageOptimizer.of(given(k))


@contextlib.contextmanager
def _naming_consumed() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "has been deleted" in str(error):
            raise ConsumedStateError from error
        raise
