"""Executes a tick: dispatches actions as programs and sends messages between stages.

    F n@k    takes activation n of stage k  ──► output is activation n of stage k+1
    B n@k    takes cotangent n of stage k   ──► input's cotangent is cotangent n of stage k-1
    W n@k    the weight half of a split backward
    U@k      applies the sum of gradients of stage k

Every call below returns before its program has run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fdg_jax.engine import ties
from fdg_jax.engine.fusion import fuse, name_of
from fdg_jax.engine.messages import Done, Metrics, MetricsList, Watch, failure, send
from fdg_jax.engine.residuals import Stash
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState, StageWork, scalar
from fdg_jax.engine.synthesizer import Output
from fdg_jax.schedule import Action, Kind, Schedule
from fdg_jax.schedule.action import ACTIVATION, COTANGENT, OUTPUT
from fdg_jax.schedule.ledger import LABEL, METRIC
from fdg_jax.shared import plain
from fdg_jax.tied_stage import lends
from fdg_jax.typing import PyTree


class Tick:
    """A mutable working copy of a `PipelineState`.

    Args:
      programs: the stages.
      schedule: how mini-batches are divided, gradients reduced, versions kept.
      state: initial state; not modified, but its buffers may be donated.
      watch: observer of dispatched programs.
    """

    def __init__(
        self,
        programs: Sequence[Stage],
        schedule: Schedule,
        state: PipelineState,
        watch: Watch | None = None,
    ) -> None:
        self.programs = programs
        self.schedule = schedule
        self.watch = watch
        self.key = state.key
        self.batch, self.origin = int(state.tick), int(state.origin)
        self.metrics = MetricsList()
        self.weight: jax.Array | None = None  # weight of the mini-batch's loss, if any
        self.done: list[Done] = []
        self.stages = [StageWork(s) for s in state.stages]

    def state(self, tick: int, origin: int) -> PipelineState:
        """The resulting state."""
        pairs = zip(self.stages, self.programs, strict=True)
        stages = tuple(own.packed(program.zeros) for own, program in pairs)
        return PipelineState(scalar(tick), scalar(origin), self.key, stages)

    def tokens(self) -> list[Done]:
        """The programs dispatched since the last call, in order."""
        tokens, self.done = self.done, []
        return tokens

    def enter(self, x: PyTree, labels: PyTree) -> None:
        """Enters one mini-batch: inputs to the first stage, labels to the stages that use them."""
        sent = self._enter(0, ACTIVATION, x)
        for k in self.schedule.labelled:
            self._enter(k, LABEL, labels)
        if self.watch is not None:
            self.watch.entered(self.batch, sent)

    def send(self, tree: PyTree, k: int) -> PyTree:
        """Sends a message to the devices of stage k."""
        return send(tree, self.programs[k])

    def _enter(self, k: int, port: str, tree: PyTree) -> PyTree:
        stage, count = self.programs[k], self.schedule.microbatches
        sent = self.send(tree if count > 1 else plain(tree), k)
        for m, part in enumerate(stage.split(sent, count=count) if count > 1 else [sent]):
            self.stages[k].put(port, self.batch * count + m, part)
        return sent

    def run(self, actions: Sequence[Action]) -> None:
        """Dispatches actions in order."""
        for group in fuse(actions, self.schedule):
            first = group[0]
            k = first.stage
            n = (first.batch + self.origin) * self.schedule.microbatches + (first.micro or 0)
            if self.origin:
                group = tuple(a._replace(batch=a.batch + self.origin) for a in group)
            since = time.perf_counter()
            try:
                with jax.profiler.TraceAnnotation(name_of(group)):
                    token = self.dispatch(group, k, n)
            except Exception as error:
                what = "".join(action.kind for action in group)
                raise failure(self.programs, k, what, self.batch_of(n), error) from error
            record = self.stages[k].record
            token = token if record is None else record
            what = "".join(action.kind for action in group)
            self.done.append(Done(k, what, self.batch_of(n), token))
            if self.watch is not None:
                self.watch.dispatched(group, since, token)

    def batch_of(self, n: int) -> int:
        """The mini-batch of micro-batch n."""
        return n // self.schedule.microbatches

    def dispatch(self, group: Sequence[Action], k: int, n: int) -> jax.Array:
        """Dispatches one program and returns its token."""
        kinds = [self.schedule.kind_of[action.kind] for action in group]
        first = kinds[0]
        if first.gradient == "applies":
            return self.update(k)
        if first.in_flight == "opens":
            if len(kinds) == 1:
                return self.forward(k, n, first, group[0].version)
            return self.train(k, n, first, kinds[1])
        if first.in_flight == "none":
            return self.teach(k, n, first)
        if first.gradient == "none":
            return self.backward_input(k, n, first)
        if len(kinds) == 1:
            return self.backward(k, n, first)
        return self.backward_update(k, n, first)

    def forward(self, k: int, n: int, kind: Kind, version: int | None = None) -> jax.Array:
        s, stage = self.stages[k], self.programs[k]
        version = s.version if version is None else s.base + version
        params = s.weights(version)
        inputs = ties.inputs_of(stage, s, n)
        labels = s.take(LABEL, n) if stage.labelled else None
        made = stage.forward(params, s.model_state, inputs, labels, s.key, s.number, s.record)
        own = Output(made.output, labels, s.number)
        kept = inputs if made.kept is None else made.kept
        stash = Stash(kept, labels, s.model_state, s.number, made.residuals)
        s.flights[n] = (version, stash)
        s.model_state, s.number, s.record = made.model_state, made.number, made.record
        if stage.loss_fn is not None:
            s.put(COTANGENT, n, made.one)
            self.report(k, n, made.report)
        self.give(kind, k, n, up=ties.output_of(stage, params, made.output), own=own)
        return made.number

    def train(self, k: int, n: int, forward: Kind, backward: Kind) -> jax.Array:
        """Forward, backward and update of one batch in a stage with a loss, as one program."""
        s, stage = self.stages[k], self.programs[k]
        if s.pending or s.flights or self.schedule.versions > 1:
            self.forward(k, n, forward)
            return self.backward_update(k, n, backward)
        own = s.params, s.model_state, s.opt_state
        batch = ties.inputs_of(stage, s, n), s.take(LABEL, n)
        fresh = stage.number_on_device(0)
        made = stage.train(*own, *batch, s.key, s.number, fresh, s.record)
        s.params, s.model_state, s.opt_state, up, report, down, s.number, s.record = made
        s.version += 1
        s.versions.clear()
        self.report(k, n, report)
        self.give(forward, k, n, up=up)
        self.give(backward, k, n, down=down)
        return s.number

    def backward(self, k: int, n: int, kind: Kind) -> jax.Array:
        s, stage = self.stages[k], self.programs[k]
        own, message = self.message(k, n, kind)
        version, stash = self.flight(k, n, kind)
        params, late = self.weights(k, version)
        two = stage.optimizer.per_gradient is not None
        correction = (s.params, s.opt_state[0]) if two else (None, None)
        rest = stash, s.key, message, s.gradient, late, s.record
        s.gradient, first, down, token, s.record = stage.backward(params, *correction, *rest)
        if two:
            s.opt_state = (first, s.opt_state[1])
        s.pending += 1
        self.forget(k)
        self.give(kind, k, n, down=down, own=own)
        return token

    def backward_input(self, k: int, n: int, kind: Kind) -> jax.Array:
        """The input half of a split backward, which the previous stage needs."""
        s, stage = self.stages[k], self.programs[k]
        message = ties.message_of(self.schedule, kind, k, s, n)
        version, stash = self.flight(k, n, kind)
        down, token = None, stash.number
        if stage.sends:
            params, _ = self.weights(k, version)
            down, token = stage.backward_input(params, stash, s.key, message)
        self.give(kind, k, n, down=down, own=message)
        self.forget(k)
        return token

    def teach(self, k: int, n: int, kind: Kind) -> jax.Array:
        """Trains a synthesizer with the cotangent of an output."""
        s, stage = self.stages[k], self.programs[k]
        cotangent, output = (s.take(port.name, n) for port in kind.takes)
        s.synthesizer, token = stage.teach(s.synthesizer, output, s.key, cotangent)
        self.give(kind, k, n, own=cotangent)
        return token

    def message(self, k: int, n: int, kind: Kind) -> tuple[Output | None, PyTree]:
        """The stage's own output, if its cotangent is predicted; and the input of a backward: the
        received or predicted cotangent."""
        s, port = self.stages[k], kind.takes[0].name
        own = ties.message_of(self.schedule, kind, k, s, n)
        if port != OUTPUT:
            return None, own
        assert s.synthesizer is not None
        return own, self.programs[k].predict(*s.synthesizer[:2], own, s.key)[0]

    def flight(self, k: int, n: int, kind: Kind) -> tuple[int, Stash]:
        """The stored data of a forward, its weight version first."""
        flights = self.stages[k].flights
        return flights.pop(n) if kind.in_flight == "closes" else flights[n]

    def backward_update(self, k: int, n: int, kind: Kind) -> jax.Array:
        """A backward and its update, as one program unless gradients are accumulated."""
        s, stage = self.stages[k], self.programs[k]
        if s.pending:
            self.backward(k, n, kind)
            return self.update(k)
        own, message = self.message(k, n, kind)
        version, stash = self.flight(k, n, kind)
        params, late = self.weights(k, version)
        rest = (s.opt_state, stash, s.key, message, late, s.record)
        kept = self.schedule.versions > 1 or lends(stage.layer) or s.version in self.held(k)
        if params is s.params and not kept:
            made = stage.backward_update_own(params, *rest)
        else:
            made = stage.backward_update(s.params, params, *rest)
        params, opt_state, down, token, record = made
        s.update(params, opt_state, record)
        self.forget(k)
        self.give(kind, k, n, down=down, own=own)
        return token

    def weights(self, k: int, version: int) -> tuple[PyTree, jax.Array]:
        """The weights of a backward whose forward used ``version``, and their age in updates."""
        s, stage, then = self.stages[k], self.programs[k], None
        rule = stage.rule
        old = rule.keeps_weights or rule.estimates_weights
        late = stage.number_on_device(s.version - version if old else 0)
        if rule.keeps_weights:
            then = s.weights(version)
        elif rule.estimates_weights:
            (then,) = stage.past_params(s.params, s.opt_state, late)
        return rule.backward_params(then, s.params), late

    def held(self, k: int) -> set[int]:
        """The weight versions needed by mini-batches in flight."""
        if not self.programs[k].rule.keeps_weights:
            return set()
        return {version for version, _ in self.stages[k].flights.values()}

    def update(self, k: int) -> jax.Array:
        s, stage = self.stages[k], self.programs[k]
        params, opt_state, token, record = stage.update(
            s.params,
            s.opt_state,
            s.gradient,
            stage.number_on_device(s.pending, np.int32),
            s.record,
            None if self.weight is None else self.send(self.weight, k),
            mean=self.schedule.reduction == "mean",
        )
        s.update(params, opt_state, record)
        self.forget(k)
        return token

    def forget(self, k: int) -> None:
        """Drops weight versions that neither mini-batches in flight nor the schedule need."""
        s, needed = self.stages[k], self.held(k)
        needed.update(range(s.version + 1 - self.schedule.versions, s.version))
        s.versions = {v: w for v, w in s.versions.items() if v in needed}

    def finish(self) -> None:
        """Applies an incomplete accumulation after the last backward; resets versions."""
        for k, s in enumerate(self.stages):
            if s.pending:
                self.update(k)
            s.base = s.version
            s.versions = {}

    def give(
        self,
        kind: Kind,
        k: int,
        n: int,
        *,
        up: PyTree = None,
        down: PyTree = None,
        own: PyTree = None,
    ) -> None:
        """Sends the results of an action to the ports of its kind."""
        for name, stage in self.schedule.gives(kind, k):
            value = own if stage == k else up if stage > k else down
            if stage != k:
                value = self.send(ties.part(name, value), stage)
            self.stages[stage].put(name, n, value)

    def report(self, k: int, n: int, report: tuple[jax.Array, dict[str, Any]]) -> None:
        """Records loss and metrics of a micro-batch; those of a mini-batch are the mean over its
        parts, or the total sum over the total weight (`fdg_jax.engine.loss`)."""
        batch, count = n // self.schedule.microbatches, self.schedule.microbatches
        if count > 1:
            s = self.stages[k]
            s.put(METRIC, n, report)
            parts = [m for m in s.inbox[METRIC] if m // count == batch]
            if len(parts) < count:
                return
            report, self.weight = self.programs[k].average([s.take(METRIC, m) for m in parts])
        self.metrics.append(Metrics(batch, *report, k))
