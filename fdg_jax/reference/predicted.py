"""Reference of stages with predicted cotangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdg_jax.engine.arguments import optimizers_of
from fdg_jax.engine.encoding import rounded
from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.synthesizer import Output, Synthesizer, SynthesizerState
from fdg_jax.layer import Layer, batch_key, typed_key
from fdg_jax.optim import StageOptimizer
from fdg_jax.reference.changes import Changes
from fdg_jax.reference.result import Result, total_of
from fdg_jax.schedule import Schedule
from fdg_jax.typing import Key, LossFn, PyTree


def train(
    stages: Sequence[Layer],
    final: LossFn,
    rule: GradientRule,
    synthesizers: Sequence[tuple[Synthesizer, SynthesizerState]],
    optimizer: Callable[[int], optax.GradientTransformation | StageOptimizer],
    schedule: Schedule,
    params: Sequence[PyTree],
    model_state: Sequence[PyTree],
    key: Key,
    batches: Sequence[tuple[PyTree, PyTree]],
    narrow: np.dtype | None,
) -> Result:
    """Evaluates every action from its definition, one derivative at a time."""
    key, last = typed_key(key), len(stages) - 1
    placed = [s.at(sum(stage.size for stage in stages[:k])) for k, s in enumerate(stages)]
    values, state = list(params), list(model_state)
    taught = [own for _, own in synthesizers]
    optimizers = optimizers_of(optimizer, stages)
    opt_states = [opt.init(p) for opt, p in zip(optimizers, params, strict=True)]
    up: dict[tuple[int, int], PyTree] = {}  # (stage, batch) -> input
    met: dict[tuple[int, int], Any] = {}  # -> weights, state and output of its forward
    seen: dict[tuple[int, int], int] = {}  # -> updates before it
    steps, changes = [0] * len(stages), Changes(rule, schedule, params)
    down: dict[tuple[int, int], Any] = {}  # -> cotangent of its output, from the stage above
    due: dict[int, PyTree] = {}
    losses: list[jax.Array] = []

    def pull_back(k: int, n: int, cotangent: PyTree) -> tuple[PyTree, PyTree]:
        then, old, _ = met[k, n]

        def run(p: PyTree, x: PyTree) -> PyTree:
            return placed[k].apply(p, old, x, train=True, key=batch_key(key, n))[0]

        weights = then if rule.keeps_weights else changes.ago(k, values[k], steps[k] - seen[k, n])
        gradient, below = jax.vjp(run, weights, up[k, n])[1](cotangent)
        return gradient, rounded(below, narrow)

    for action in (a for tick in schedule.stream(len(batches)) for a in tick):
        k, n, kind = action.stage, action.batch, action.kind
        if kind == "U":
            gradient = due.pop(k)
            updates, opt_states[k] = optimizers[k].update(gradient, opt_states[k], values[k])
            old, values[k] = values[k], optax.apply_updates(values[k], updates)
            changes.add(k, old, values[k])
            steps[k] += 1
            continue
        labels, noise = batches[n][1], batch_key(key, n)
        own = Output(met[k, n][2], labels, jnp.int32(n)) if (k, n) in met else None
        if kind == "F":
            x = up.setdefault((k, n), batches[n][0])
            y, left = placed[k].apply(values[k], state[k], x, train=True, key=noise)
            y = rounded(y, narrow if k < last else None)
            met[k, n], seen[k, n] = (values[k], state[k], y), steps[k]
            state[k] = left
            up[k + 1, n] = y
            if k == last:
                value, vjp = jax.vjp(lambda y, t=labels: total_of(final(y, t), 1)[0], y)
                losses.append(value)
                (down[k, n],) = vjp(jnp.ones_like(value))
        elif kind == "P":
            assert own is not None
            (predicted,), _ = synthesizers[k][0].predict(*taught[k][:2], own, key)
            due[k], below = pull_back(k, n, predicted)
            if schedule.name == "dni":
                down[k - 1, n] = below
        elif kind == "T":

            def error(p: PyTree, k: int = k, n: int = n, own: Any = own) -> tuple[Any, PyTree]:
                (made,), left = synthesizers[k][0].predict(p, taught[k].model_state, own, key)
                return jnp.mean((made - down[k, n]) ** 2), left

            gradient, left = jax.grad(error, has_aux=True)(taught[k].params)
            learns = synthesizers[k][0].optimizer
            updates, moments = learns.update(gradient, taught[k].opt_state, taught[k].params)
            new = optax.apply_updates(taught[k].params, updates)
            taught[k] = SynthesizerState(new, left, moments)
        elif kind == "D":
            _, down[k - 1, n] = pull_back(k, n, down[k, n])
        elif kind == "B":
            due[k], down[k - 1, n] = pull_back(k, n, down[k, n])
    return Result(values, state, losses)
