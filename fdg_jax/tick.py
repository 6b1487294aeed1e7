"""What a tick does: actions become programs on devices, and messages between them.

    F n@k    takes activation n of stage k  ──► output is activation n of stage k+1
    B n@k    takes cotangent n of stage k   ──► input's cotangent is cotangent n of stage k-1
    U@k      applies what stage k has accumulated

Every call below returns before its program has run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fdg_jax.layer import PyTree
from fdg_jax.schedule import Action
from fdg_jax.stage import Stage
from fdg_jax.state import Flight, PipelineState

Metrics = dict[str, Any]


class Tick:
    """A state being changed.

    Args:
      stages: the programs of each stage.
      state: what they start from; it is not written to, but its buffers may be donated.
    """

    def __init__(self, stages: Sequence[Stage], state: PipelineState) -> None:
        self.programs = stages
        self.last = len(stages) - 1
        self.key = state.key
        self.batch = state.tick
        self.origin = state.origin
        self.metrics: list[Metrics] = []
        self.done: dict[int, jax.Array] = {}
        self.stages = [
            s._replace(
                flights=dict(s.flights),
                activations=dict(s.activations),
                cotangents=dict(s.cotangents),
                labels=dict(s.labels),
            )
            for s in state.stages
        ]

    def state(self, tick: int, origin: int) -> PipelineState:
        return PipelineState(tick, origin, self.key, tuple(self.stages))

    def tokens(self) -> list[jax.Array]:
        """A small output of the last program of every stage that did something."""
        tokens, self.done = list(self.done.values()), {}
        return tokens

    def enter(self, x: PyTree, labels: PyTree) -> None:
        first, last = self.programs[0], self.programs[-1]
        self.stages[0].activations[self.batch] = send(x, first, "inputs")
        self.stages[-1].labels[self.batch] = send(labels, last, "labels")

    def run(self, actions: Sequence[Action]) -> None:
        for group in fuse(actions, self.last):
            k, n = group[0].stage, group[0].batch + self.origin
            match "".join(action.kind for action in group):
                case "FBU":
                    self.train(k, n)
                case "F":
                    self.forward(k, n)
                case "B":
                    self.backward(k, n)
                case "BU":
                    self.backward_update(k, n)
                case "U":
                    self.update(k)

    def forward(self, k: int, n: int) -> None:
        s = self.stages[k]
        inputs, labels = s.activations.pop(n), s.labels.pop(n, None)
        output, model_state, number, residuals = self.programs[k].forward(
            s.params, s.model_state, inputs, labels, s.key, s.number
        )
        s.flights[n] = Flight(s.params, s.version, inputs, s.number, residuals)
        self.stages[k] = s._replace(model_state=model_state, number=number)
        self.done[k] = number
        if k < self.last:
            self.stages[k + 1].activations[n] = send(output, self.programs[k + 1])
        else:
            metrics, s.cotangents[n] = output
            self.report(n, metrics)

    def train(self, k: int, n: int) -> None:
        s = self.stages[k]
        if s.held or s.flights:
            self.forward(k, n)
            self.backward_update(k, n)
            return
        params, model_state, opt_state, metrics, of_inputs, number = self.programs[k].train(
            s.params,
            s.model_state,
            s.opt_state,
            s.activations.pop(n),
            s.labels.pop(n),
            s.key,
            s.number,
        )
        self.stages[k] = s._replace(
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            number=number,
            version=s.version + 1,
        )
        self.done[k] = number
        self.report(n, metrics)
        self.send_back(k, n, of_inputs)

    def backward(self, k: int, n: int) -> None:
        s = self.stages[k]
        flight, cotangent = s.flights.pop(n), s.cotangents.pop(n)
        gradient, of_inputs, token = self.programs[k].backward(
            flight.params, flight.inputs, flight.residuals, cotangent, flight.number, s.gradient
        )
        self.stages[k] = s._replace(gradient=gradient, held=s.held + 1)
        self.done[k] = token
        self.send_back(k, n, of_inputs)

    def backward_update(self, k: int, n: int) -> None:
        s, stage = self.stages[k], self.programs[k]
        if s.held:
            self.backward(k, n)
            self.update(k)
            return
        flight, cotangent = s.flights.pop(n), s.cotangents.pop(n)
        rest = (s.opt_state, flight.inputs, flight.residuals, cotangent, flight.number)
        shared = any(other.version == s.version for other in s.flights.values())
        if flight.version == s.version and not shared:
            params, opt_state, of_inputs, token = stage.backward_update_own(s.params, *rest)
        else:
            params, opt_state, of_inputs, token = stage.backward_update(
                s.params, flight.params, *rest
            )
        self.stages[k] = s._replace(params=params, opt_state=opt_state, version=s.version + 1)
        self.done[k] = token
        self.send_back(k, n, of_inputs)

    def update(self, k: int) -> None:
        s, stage = self.stages[k], self.programs[k]
        held = jax.device_put(np.int32(s.held), stage.replicated)
        params, opt_state = stage.update(s.params, s.opt_state, s.gradient, held)
        self.stages[k] = s._replace(
            params=params, opt_state=opt_state, gradient=None, held=0, version=s.version + 1
        )

    def send_back(self, k: int, n: int, of_inputs: PyTree) -> None:
        if k > 0:
            self.stages[k - 1].cotangents[n] = send(of_inputs, self.programs[k - 1])

    def report(self, n: int, metrics: Metrics) -> None:
        self.metrics.append({"batch": n, **metrics})


def fuse(actions: Sequence[Action], last: int) -> Iterator[tuple[Action, ...]]:
    """Actions in groups that are one program: B, U; in the last stage F, B, U of one batch."""
    i = 0
    while i < len(actions):
        a = actions[i]
        kinds = [(b.kind, b.batch) for b in actions[i : i + 3] if b.stage == a.stage]
        if a.stage == last and kinds == [("F", a.batch), ("B", a.batch), ("U", a.batch)]:
            size = 3
        elif kinds[:2] == [("B", a.batch), ("U", a.batch)]:
            size = 2
        else:
            size = 1
        yield tuple(actions[i : i + size])
        i += size


def send(tree: PyTree, stage: Stage, name: str = "inputs") -> PyTree:
    """A message onto a stage's devices; numpy arrays are copied, CPU devices would alias them."""

    def copy(leaf: Any) -> Any:
        return leaf if isinstance(leaf, jax.Array) else np.array(leaf)

    tree = jax.tree.map(copy, tree)
    for leaf in jax.tree.leaves(tree):
        if leaf.ndim and leaf.shape[0] % stage.mesh.size:
            raise ValueError(
                f"{name}: a batch of {leaf.shape[0]} does not divide over the {stage.mesh.size} "
                "devices of a stage; take a multiple"
            )
    return jax.device_put(tree, jax.tree.map(stage.placement, tree))
