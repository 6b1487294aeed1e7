"""The host never waits for a device, and does not run away from one either."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fdg_jax as fdg
from fdg_jax.checkpoint import Checkpointer
from tests import networks


def slow_layer(turns: int) -> fdg.Layer:
    """A layer whose forward takes long, and whose backward does not."""

    def apply(params, state, x, *, train, key):
        # A host callback would not do: JAX runs programs with one synchronously on CPU.
        still = jax.lax.stop_gradient(x)
        late = jax.lax.fori_loop(0, turns, lambda i, v: jnp.tanh(v @ v.T @ still), still)
        return params * x + jax.lax.stop_gradient(late), state

    return fdg.Layer(lambda key, x: (jnp.ones(()), ()), apply)


BATCH = (np.ones((256, 128)) / 128, np.zeros((256, 128)))


def pipeline(turns: int, max_ahead: int) -> fdg.Pipeline:
    plain = fdg.Layer(lambda key, x: (jnp.ones(()), ()), lambda p, s, x, *, train, key: (p * x, s))
    return fdg.Pipeline(
        [plain, slow_layer(turns), plain],
        lambda y, t: (jnp.mean((y - t) ** 2), {}),
        lambda k: optax.sgd(0.01),
        fdg.schedule.fdg(3),
        max_ahead=max_ahead,
    )


def test_step_returns_before_a_slow_stage_is_done_and_transfers_nothing_unasked():
    pipe = pipeline(turns=200, max_ahead=4)
    state = pipe.init(jax.random.key(0), BATCH[0])
    for _ in range(8):  # compiles every program
        state, _ = pipe.step(state, BATCH)
    jax.block_until_ready(state)
    begin = time.perf_counter()
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, metrics = pipe.step(state, BATCH)
        dispatch = time.perf_counter() - begin
        unfinished = not state.stages[1].number.is_ready()
    jax.block_until_ready(state)
    work = time.perf_counter() - begin
    assert unfinished
    assert dispatch < work / 3  # not even one of the three slow forwards was waited for
    assert float(metrics[0].loss) >= 0


def test_a_save_returns_before_a_slow_stage_is_done(tmp_path):
    pipe = pipeline(turns=200, max_ahead=4)
    state = pipe.init(jax.random.key(0), BATCH[0])
    for _ in range(8):
        state, _ = pipe.step(state, BATCH)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, 8)  # compiles the copies, once
        checkpoints.wait()
        with jax.transfer_guard("disallow"):
            for _ in range(3):
                state, _ = pipe.step(state, BATCH)
            checkpoints.save(state, 11)
            unfinished = not state.stages[1].number.is_ready()
            state, _ = pipe.step(state, BATCH)
    assert unfinished
    assert checkpoints.latest() == 11


def test_run_ahead_reaches_its_bound_and_stays_within_it():
    max_ahead = 3
    pipe = pipeline(turns=10, max_ahead=max_ahead)
    state = pipe.init(jax.random.key(0), BATCH[0])
    numbers, ahead = [], []
    for _ in range(1000):
        state, _ = pipe.step(state, BATCH)
        numbers.append(state.stages[1].number)
        numbers = [number for number in numbers if not number.is_ready()]
        ahead.append(len(numbers))
    assert max(ahead) == max_ahead
    jax.block_until_ready(state)


def test_a_thousand_steps_hold_no_more_than_fifty():
    pipe = fdg.Pipeline(
        fdg.partition(networks.network(), 3, networks.batches(1)[0][0], cost=[1] * 7),
        networks.loss_fn,
        networks.sgd(0.5, 3),
        fdg.schedule.fdg(3),
    )
    data = networks.batches(10)
    state = pipe.init(jax.random.key(0), data[0][0])
    held = {}
    for step in range(1, 1001):
        state, _ = pipe.step(state, data[step % 10])
        if step in (50, 1000):
            jax.block_until_ready(state)
            held[step] = sum(array.nbytes for array in jax.live_arrays())
    assert held[1000] == held[50]
    assert [len(s.flights.items()) for s in state.stages] == [4, 2, 0]
