"""Reference of stages with their own losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdg_jax.engine.arguments import optimizers_of
from fdg_jax.engine.encoding import rounded
from fdg_jax.layer import Layer, batch_key, typed_key
from fdg_jax.optim import StageOptimizer
from fdg_jax.reference.result import Result, total_of
from fdg_jax.schedule import Schedule
from fdg_jax.typing import Key, LossFn, PyTree


def train(
    stages: Sequence[Layer],
    losses: Sequence[LossFn | None],
    optimizer: Callable[[int], optax.GradientTransformation | StageOptimizer],
    schedule: Schedule,
    params: Sequence[PyTree],
    model_state: Sequence[PyTree],
    key: Key,
    batches: Sequence[tuple[PyTree, PyTree]],
    narrow: np.dtype | None,
) -> Result:
    """Trains every stage separately: constant input, own loss, one update per mini-batch."""
    key = typed_key(key)
    values, state, found = list(params), list(model_state), []
    optimizers = optimizers_of(optimizer, stages)
    opt_states = [opt.init(p) for opt, p in zip(optimizers, params, strict=True)]
    sent: dict[tuple[int, int], PyTree] = {}  # (stage, batch) -> its input
    for action in (a for tick in schedule.stream(len(batches)) for a in tick):
        k, n = action.stage, action.batch
        if schedule.kind_of[action.kind].in_flight != "opens":
            continue
        layer = stages[k].at(sum(stage.size for stage in stages[:k]))

        def loss(p: PyTree, k: int = k, n: int = n, layer: Layer = layer) -> Any:
            one, labels = losses[k], batches[n][1]
            assert one is not None
            noise = batch_key(key, n)
            y, left = layer.apply(p, state[k], sent[k, n], train=True, key=noise)
            scores, left = layer.scores(p, left, y, train=True, key=noise)
            return total_of(one(scores, labels), 1)[0], (y, left)

        sent.setdefault((k, n), batches[n][0])
        (value, (y, state[k])), gradient = jax.value_and_grad(loss, has_aux=True)(values[k])
        sent[k + 1, n] = rounded(y, narrow)
        extra = {"stale_params": values[k], "staleness": jnp.float32(0)}
        updates, opt_states[k] = optimizers[k].update(gradient, opt_states[k], values[k], **extra)
        values[k] = optax.apply_updates(values[k], updates)
        if k == len(stages) - 1:
            found.append(value)
    return Result(values, state, found)
