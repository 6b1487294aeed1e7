"""Reference of stages that reconstruct their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from fdg_jax.engine.arguments import optimizers_of
from fdg_jax.engine.encoding import rounded
from fdg_jax.layer import Chain, Layer, batch_key, chain, typed_key
from fdg_jax.optim import StageOptimizer
from fdg_jax.reference.result import Result, part_of, reduced, total_of
from fdg_jax.schedule import Schedule
from fdg_jax.typing import Key, LossFn, PyTree


def train(
    stages: Sequence[Layer],
    final: LossFn,
    optimizer: Callable[[int], optax.GradientTransformation | StageOptimizer],
    schedule: Schedule,
    params: Sequence[PyTree],
    model_state: Sequence[PyTree],
    key: Key,
    batches: Sequence[tuple[PyTree, PyTree]],
    narrow: np.dtype | None,
) -> Result:
    """Evaluates inverses and derivatives run by run, from their definitions."""
    key, last, count = typed_key(key), len(stages) - 1, schedule.microbatches
    placed = [s.at(sum(stage.size for stage in stages[:k])) for k, s in enumerate(stages)]
    parts = [_runs(stage) for stage in placed]
    values, state = list(params), list(model_state)
    optimizers = optimizers_of(optimizer, stages)
    opt_states = [opt.init(p) for opt, p in zip(optimizers, params, strict=True)]
    up: dict[tuple[int, int], PyTree] = {}  # (stage, micro-batch) -> input at its forward
    kept: dict[tuple[int, int], Any] = {}  # -> inputs of its runs, state of its forward
    down: dict[tuple[int, int], Any] = {}  # -> output reconstructed above, and its cotangent
    ready: dict[int, Any] = {}  # of the last stage: gradient, input and its cotangent
    due: list[list[tuple[PyTree, Any]]] = [[] for _ in stages]
    weights: dict[int, Any] = {}  # micro-batch -> weight of its loss, or None
    losses: list[list[tuple[jax.Array, Any]]] = [[] for _ in batches]
    for action in (a for tick in schedule.stream(len(batches)) for a in tick):
        k, n = action.stage, action.batch * count + (action.micro or 0)
        kind, noise = schedule.kind_of[action.kind], batch_key(key, n)
        if kind.in_flight == "opens":
            x, labels = part_of(batches[action.batch], action.micro or 0, count)
            x = up.pop((k, n), x)
            if k == last:

                def loss(p: PyTree, x: PyTree, labels: Any = labels, noise: Any = noise) -> Any:
                    y, left = placed[last].apply(p, state[last], x, train=True, key=noise)
                    total, weight = total_of(final(y, labels), count)
                    return total, (left, weight)

                (value, (state[k], weight)), (gradient, below) = jax.value_and_grad(
                    loss, argnums=(0, 1), has_aux=True, allow_int=True
                )(values[k], x)
                losses[action.batch].append((value, weight))
                weights[n] = weight
                ready[n] = gradient, rounded((x, below), narrow)
            else:
                inputs, left = [], []
                for i, layer in parts[k]:
                    inputs.append(x)
                    x, s = layer.apply(
                        _at(values[k], i), _at(state[k], i), x, train=True, key=noise
                    )
                    left.append(s)
                kept[k, n] = inputs, state[k]
                state[k] = _joined(stages[k], left)
                up[k + 1, n] = rounded(x, narrow)
        elif kind.gradient != "applies":  # a backward, or one of its halves
            if k == last:
                gradient, down[k - 1, n] = ready[n]
            else:
                y, cotangent = down[k, n]
                inputs, old = kept[k, n]
                found = []
                for (i, layer), x in reversed(list(zip(parts[k], inputs, strict=True))):
                    p, s = _at(values[k], i), _at(old, i)
                    if layer.inverse is not None:
                        x = layer.inverse(p, s, y, train=True, key=noise)

                    def run(
                        p: PyTree, x: PyTree, layer: Any = layer, s: Any = s, z: Any = noise
                    ) -> PyTree:
                        return layer.apply(p, s, x, train=True, key=z)[0]

                    of_params, cotangent = jax.vjp(run, p, x)[1](cotangent)
                    y = x
                    found.append(of_params)
                gradient = _joined(stages[k], found[::-1])
                down[k - 1, n] = rounded((y, cotangent), narrow)
            if kind.gradient == "adds":
                due[k].append((gradient, weights[n]))
        else:
            mean = reduced(due[k], schedule.reduction == "mean")
            due[k] = []
            updates, opt_states[k] = optimizers[k].update(mean, opt_states[k], values[k])
            values[k] = optax.apply_updates(values[k], updates)
    return Result(values, state, [reduced(found) for found in losses])


def _runs(stage: Layer) -> list[tuple[slice | None, Layer]]:
    """The layers of a stage; adjacent layers without an inverse are joined."""
    if not isinstance(stage, Chain):
        return [(None, stage)]
    groups: list[list[int]] = []
    for i, layer in enumerate(stage.layers):
        plain = layer.inverse is None
        if plain and groups and stage.layers[groups[-1][-1]].inverse is None:
            groups[-1].append(i)
        else:
            groups.append([i])
    first = [
        stage.first + sum(one.size for one in stage.layers[:i]) for i in range(len(stage.layers))
    ]
    return [
        (slice(g[0], g[-1] + 1), chain(stage.layers[g[0] : g[-1] + 1], first=first[g[0]]))
        for g in groups
    ]


def _at(tree: PyTree, part: slice | None) -> PyTree:
    return tree if part is None else tree[part]


def _joined(stage: Layer, parts: Sequence[PyTree]) -> PyTree:
    return tuple(v for part in parts for v in part) if isinstance(stage, Chain) else parts[0]
