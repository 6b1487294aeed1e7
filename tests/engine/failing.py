"""Errors of a pipeline for a NaN in a batch and for an error in a stage."""

from __future__ import annotations

import jax
import numpy as np

import fdg_jax as fdg
from fdg_jax.errors import StageError
from fdg_jax.schedule import Schedule
from tests import networks


def failing(at: int) -> fdg.Layer:
    """A layer that raises if a batch begins with ``at``."""

    def check(x: np.ndarray) -> np.ndarray:
        if x[0, 0] == at:
            raise ArithmeticError("this layer has had enough")
        return x

    def apply(params, state, x, *, train, key):
        still = jax.lax.stop_gradient(x)
        seen = jax.pure_callback(check, jax.ShapeDtypeStruct(x.shape, x.dtype), still)
        return x + 0 * jax.lax.stop_gradient(seen), state

    return fdg.Layer(lambda key, x: ((), ()), apply)


def error_in_stage_1(schedule: Schedule) -> StageError:
    """Stage 1 of 3 raises at mini-batch 5."""
    identity = fdg.from_fn(lambda x: x)
    last = networks.dense(networks.CLASSES, lambda x: x)
    stages = [fdg.chain([identity, identity]), fdg.chain([identity, failing(5)]), last]
    pipe = fdg.Pipeline(stages, networks.loss_fn, networks.sgd(1, 3), schedule, max_ahead=2)
    data = networks.batches(12)
    for n, (x, _) in enumerate(data):
        x[0, 0] = n
    return caught(pipe, data)


def nan_in_a_batch(on_nonfinite: str) -> str:
    """Mini-batch 5 contains a NaN, K = 3."""
    layers = [
        networks.dense(networks.WIDTH),
        networks.batch_norm(),
        networks.dense(networks.CLASSES),
    ]
    schedule, data = fdg.schedule.fdg(3), networks.batches(12)
    data[5][0][2, 1] = np.nan
    pipe = fdg.Pipeline(
        layers, networks.loss_fn, networks.sgd(1, 3), schedule, on_nonfinite=on_nonfinite
    )
    if on_nonfinite == "stop":
        return str(caught(pipe, data))
    state, _ = networks.run(pipe, data)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(jax.device_get(pipe.params(state))))
    return f"the run goes on; mini-batches left out per stage: {pipe.skipped(state)}"


def caught(pipe: fdg.Pipeline, data: list) -> StageError:
    state = pipe.init(jax.random.key(7), data[0][0])
    try:
        for batch in data:
            state, _ = pipe.step(state, batch)
        pipe.check()
    except StageError as error:
        return error
    raise AssertionError("nothing was raised")
