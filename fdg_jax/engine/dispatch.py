"""What a tick does: actions become programs on devices, and messages between them.

    F n@k    takes activation n of stage k  ──► output is activation n of stage k+1
    B n@k    takes cotangent n of stage k   ──► input's cotangent is cotangent n of stage k-1
    U@k      applies what stage k has accumulated

Every call below returns before its program has run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from fdg_jax.engine.nonfinite import Record
from fdg_jax.engine.placement import put
from fdg_jax.engine.residuals import Stash
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import Flight, PipelineState
from fdg_jax.errors import StageError
from fdg_jax.schedule import Action, Schedule
from fdg_jax.typing import PyTree

Metrics = dict[str, Any]


class Done(NamedTuple):
    """A program that was dispatched.

    Attributes:
      stage: whose.
      what: its actions, as in a schedule's grid.
      batch: the mini-batch that it worked on.
      token: a small output, never donated: there when the program has ended; the stage's record
        where it keeps one.
    """

    stage: int
    what: str
    batch: int
    token: jax.Array


class Watch(Protocol):
    """Somebody who sees what is dispatched, while it is; must not wait for a device."""

    def entered(self, batch: int, inputs: PyTree) -> None:
        """A mini-batch enters; ``inputs`` are on the first stage's devices, never donated."""

    def dispatched(self, actions: Sequence[Action], since: float, token: jax.Array) -> None:
        """A program, of actions of one stage, whose dispatch began at ``time.perf_counter()``."""


class Tick:
    """A state being changed.

    Args:
      programs: the stages.
      schedule: how mini-batches are divided, gradients reduced, versions kept.
      today: whether a backward uses the weights of its own day, and not those of its forward.
      state: what this starts from; it is not written to, but its buffers may be donated.
      watch: who sees what is dispatched.
    """

    def __init__(
        self,
        programs: Sequence[Stage],
        schedule: Schedule,
        today: bool,
        state: PipelineState,
        watch: Watch | None = None,
    ) -> None:
        self.programs = programs
        self.schedule = schedule
        self.today = today
        self.watch = watch
        self.last = len(programs) - 1
        self.key = state.key
        self.batch, self.origin = int(state.tick), int(state.origin)
        self.metrics: list[Metrics] = []
        self.done: list[Done] = []
        self.stages = [s.copied() for s in state.stages]

    def state(self, tick: int, origin: int) -> PipelineState:
        """What it has become."""
        return PipelineState(tick, origin, self.key, tuple(self.stages))

    def tokens(self) -> list[Done]:
        """The programs dispatched since the last call, in order."""
        tokens, self.done = self.done, []
        return tokens

    def enter(self, x: PyTree, labels: PyTree) -> None:
        """One mini-batch: inputs to the first stage, labels to the last."""
        count = self.schedule.microbatches
        for tree, k, name in ((x, 0, "inputs"), (labels, self.last, "labels")):
            stage, own = self.programs[k], self.stages[k]
            sent = send(tree, stage, name, count)
            parts = stage.split(sent, count=count) if count > 1 else [sent]
            waiting = own.activations if name == "inputs" else own.labels
            waiting.update({self.batch * count + m: part for m, part in enumerate(parts)})
            if self.watch is not None and name == "inputs":
                self.watch.entered(self.batch, sent)

    def run(self, actions: Sequence[Action]) -> None:
        """Dispatches actions in their order."""
        for group in fuse(actions, self.last):
            first = group[0]
            k = first.stage
            n = (first.batch + self.origin) * self.schedule.microbatches + (first.micro or 0)
            kinds = "".join(action.kind for action in group)
            group = tuple(replace(action, batch=action.batch + self.origin) for action in group)
            since = time.perf_counter()
            try:
                with jax.profiler.TraceAnnotation(name_of(group)):
                    token = self.dispatch(kinds, k, n, first.version)
            except Exception as error:
                raise failure(self.programs, k, kinds, self.batch_of(n), error) from error
            self.done.append(Done(k, kinds, self.batch_of(n), token))
            if self.watch is not None:
                self.watch.dispatched(group, since, token)

    def batch_of(self, n: int) -> int:
        """The mini-batch that micro-batch n is part of."""
        return n // self.schedule.microbatches

    def dispatch(self, kinds: str, k: int, n: int, version: int | None) -> jax.Array:
        """One program; returns its token."""
        match kinds:
            case "FBU":
                token = self.train(k, n)
            case "F":
                token = self.forward(k, n, version)
            case "B":
                token = self.backward(k, n)
            case "BU":
                token = self.backward_update(k, n)
            case "U":
                token = self.update(k)
            case _:
                raise AssertionError(f"no program does {kinds}")
        record = self.stages[k].record
        return token if record is None else record

    def forward(self, k: int, n: int, version: int | None = None) -> jax.Array:
        s = self.stages[k]
        version = s.version if version is None else s.base + version
        params = s.params if version == s.version else s.older[version]
        inputs, labels = s.activations.pop(n), s.labels.pop(n, None)
        output, model_state, number, residuals, record = self.programs[k].forward(
            params, s.model_state, inputs, labels, s.key, s.number, s.record
        )
        stash = Stash(inputs, labels, s.model_state, s.number, residuals)
        s.flights[n] = Flight(None if self.today else params, version, stash)
        self.stages[k] = s._replace(model_state=model_state, number=number, record=record)
        if k < self.last:
            self.stages[k + 1].activations[n] = send(output, self.programs[k + 1])
        else:
            metrics, s.cotangents[n] = output
            self.report(n, metrics)
        return number

    def train(self, k: int, n: int) -> jax.Array:
        """Forward, backward and update of one batch in the last stage, as one program."""
        s = self.stages[k]
        if s.held or s.flights or self.schedule.versions > 1:
            self.forward(k, n)
            return self.backward_update(k, n)
        params, model_state, opt_state, metrics, of_inputs, number, record = self.programs[k].train(
            s.params,
            s.model_state,
            s.opt_state,
            s.activations.pop(n),
            s.labels.pop(n),
            s.key,
            s.number,
            s.record,
        )
        self.stages[k] = s._replace(
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            number=number,
            version=s.version + 1,
            record=record,
        )
        self.report(n, metrics)
        self.send_back(k, n, of_inputs)
        return number

    def backward(self, k: int, n: int) -> jax.Array:
        s = self.stages[k]
        flight, cotangent = s.flights.pop(n), s.cotangents.pop(n)
        params = s.params if self.today else flight.params
        gradient, of_inputs, token, record = self.programs[k].backward(
            params, flight.stash, s.key, cotangent, s.gradient, s.record
        )
        self.stages[k] = s._replace(gradient=gradient, held=s.held + 1, record=record)
        self.send_back(k, n, of_inputs)
        return token

    def backward_update(self, k: int, n: int) -> jax.Array:
        """A backward and the update after it, as one program unless something is accumulated."""
        s, stage = self.stages[k], self.programs[k]
        if s.held:
            self.backward(k, n)
            return self.update(k)
        flight, cotangent = s.flights.pop(n), s.cotangents.pop(n)
        rest = (s.opt_state, flight.stash, s.key, cotangent, s.record)
        current = self.today or flight.version == s.version
        elsewhere = any(f.params is not None and f.version == s.version for f in s.flights.values())
        if current and not elsewhere and self.schedule.versions == 1:
            new = stage.backward_update_own(s.params, *rest)
        else:
            old = s.params if self.today else flight.params
            new = stage.backward_update(s.params, old, *rest)
        params, opt_state, of_inputs, token, record = new
        self.updated(k, params, opt_state, record)
        self.send_back(k, n, of_inputs)
        return token

    def update(self, k: int) -> jax.Array:
        s, stage = self.stages[k], self.programs[k]
        held = put(np.int32(s.held), stage.replicated)
        params, opt_state, token, record = stage.update(
            s.params,
            s.opt_state,
            s.gradient,
            held,
            s.record,
            mean=self.schedule.reduction == "mean",
        )
        self.updated(k, params, opt_state, record)
        return token

    def updated(self, k: int, params: PyTree, opt_state: Any, record: Record) -> None:
        s = self.stages[k]
        older = {**s.older, s.version: s.params}
        kept = sorted(older)[len(older) - (self.schedule.versions - 1) :]
        self.stages[k] = s._replace(
            params=params,
            opt_state=opt_state,
            gradient=None,
            held=0,
            version=s.version + 1,
            older={version: older[version] for version in kept},
            record=record,
        )

    def finish(self) -> None:
        """After the last backward: what is left of an accumulation; versions count from here."""
        for k, s in enumerate(self.stages):
            if s.held:
                self.update(k)
            self.stages[k] = self.stages[k]._replace(base=self.stages[k].version, older={})

    def send_back(self, k: int, n: int, of_inputs: PyTree) -> None:
        if k > 0:
            self.stages[k - 1].cotangents[n] = send(of_inputs, self.programs[k - 1])

    def report(self, n: int, metrics: Metrics) -> None:
        """Metrics of a micro-batch; those of a mini-batch are the mean over its parts."""
        batch, count = n // self.schedule.microbatches, self.schedule.microbatches
        if count > 1:
            parts = self.stages[self.last].metrics.setdefault(batch, [])
            parts.append(metrics)
            if len(parts) < count:
                return
            metrics = self.programs[self.last].average(self.stages[self.last].metrics.pop(batch))
        self.metrics.append({"batch": batch, **metrics})


def failure(
    programs: Sequence[Stage], k: int, what: str, batch: int, error: Exception
) -> StageError:
    """An error that names where it came from."""
    return StageError(
        f"stage {k} ({programs[k].layers}), mini-batch {batch}, {what}: "
        f"{type(error).__name__}: {error}",
        k,
        batch,
    )


def name_of(actions: Sequence[Action]) -> str:
    """A program's actions and stage: F3 B3 U@1."""
    return f"{' '.join(action.label for action in actions)}@{actions[0].stage}"


def fuse(actions: Sequence[Action], last: int) -> Iterator[tuple[Action, ...]]:
    """Actions in groups that are one program: B, U; in the last stage F, B, U of one batch."""
    i = 0
    while i < len(actions):
        a, *after = actions[i : i + 3]
        kinds: str = a.kind
        for b in after:
            part = b.micro == a.micro or b.kind == "U"
            kinds += b.kind if (b.stage, b.batch, part) == (a.stage, a.batch, True) else "-"
        if kinds == "FBU" and a.stage == last and a.version is None:
            size = 3
        elif kinds.startswith("BU"):
            size = 2
        else:
            size = 1
        yield tuple(actions[i : i + size])
        i += size


def send(tree: PyTree, stage: Stage, name: str = "inputs", microbatches: int = 1) -> PyTree:
    """A message onto a stage's devices; numpy arrays are copied, CPU devices would alias them."""

    def copy(leaf: Any) -> Any:
        return leaf if isinstance(leaf, jax.Array) else np.array(leaf)

    tree = jax.tree.map(copy, tree)
    for leaf in jax.tree.leaves(tree):
        if leaf.ndim and leaf.shape[0] % microbatches:
            raise ValueError(
                f"{name}: a batch of {leaf.shape[0]} does not divide into {microbatches} "
                "micro-batches; take a multiple"
            )
        if leaf.ndim and leaf.shape[0] // microbatches % stage.mesh.size:
            raise ValueError(
                f"{name}: a batch of {leaf.shape[0] // microbatches} does not divide over the "
                f"{stage.mesh.size} devices of a stage; take a multiple"
            )
    return put(tree, jax.tree.map(stage.placement, tree))
