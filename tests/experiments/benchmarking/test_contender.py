"""What is timed: every contender trains the same network, and a stage alone does the same work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdg_jax as fdg
from experiments.benchmarking import contender
from experiments.benchmarking.alone import Alone, turn
from experiments.benchmarking.workload import Workload
from tests.experiments.tiny import made, params

# The engine's own programs and a plain step compute the same in another order.
ROUNDING = {"rtol": 2e-5, "atol": 1e-6}


def same(one: contender.Contender, other: contender.Contender, **tolerance: float) -> bool:
    close = (
        np.allclose(a, b, **tolerance) for a, b in zip(params(one), params(other), strict=True)
    )
    return all(close)


def test_contenders_train_the_same_network(tiny):
    start = made(tiny, "backprop", steps=0 + 1)
    plain = made(tiny, "backprop", steps=5)
    assert not same(plain, start, **ROUNDING)
    exact = {"rtol": 0, "atol": 0}
    engine = made(tiny, "engine_k1", steps=5)
    assert same(plain, engine, **exact)
    assert plain.loss == engine.loss
    parallel = made(tiny, "data_parallel", steps=5)
    assert parallel.devices == 2
    assert same(plain, parallel, **ROUNDING)
    assert len(parallel.batch[0].sharding.device_set) == 2

    delayed = made(tiny, "fdg", steps=6)
    assert same(delayed, made(tiny, "fdg_recompute_stale", steps=6), **ROUNDING)
    assert same(delayed, made(tiny, "one_device_k2", steps=6), **ROUNDING)
    assert same(delayed, made(tiny, "fdg_guarded", steps=6), **ROUNDING)
    assert same(made(tiny, "dsp", steps=6), made(tiny, "fdg_recompute", steps=6), **exact)
    assert not same(delayed, made(tiny, "fdg_recompute", steps=6), **ROUNDING)
    assert not same(delayed, plain, **ROUNDING)
    single = made(tiny, "one_device_k4", steps=1)
    assert (single.stages, single.devices) == (4, 1)


def test_the_update_is_sgd_with_momentum_and_weight_decay(tiny):
    work = Workload(tiny)
    layer = work.split(1)[0].at(0)
    weights, model_state = layer.init(work.key, jnp.zeros(work.example.shape, jnp.float32))
    velocity = jax.tree.map(jnp.zeros_like, weights)

    def loss(weights, model_state):
        y, new = layer.apply(weights, model_state, work.inputs, train=True, key=work.key)
        return -jax.nn.log_softmax(y)[jnp.arange(8), work.labels].mean(), new

    for _ in range(3):
        gradient, model_state = jax.grad(loss, has_aux=True)(weights, model_state)
        velocity = jax.tree.map(lambda v, g, w: 0.9 * v + g + 5e-4 * w, velocity, gradient, weights)
        weights = jax.tree.map(lambda w, v: w - 1e-3 * v, weights, velocity)
    found = params(made(tiny, "backprop", steps=3))
    # Each weight has moved by about 1e-3 of its gradient; decay is 1e-6 of itself.
    for a, b in zip(jax.tree.leaves(weights), found, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-7 if b.dtype == np.float32 else 1e-9)


@pytest.mark.parametrize("name", ["fdg", "fdg_recompute_stale", "fdg_recompute"])
def test_a_stage_alone_does_what_it_does_in_the_pipeline(tiny, name):
    for stages in (2, 3):
        cuts = ",".join(map(str, range(2, stages + 1)))
        settings = dataclasses.replace(tiny, num_stages=stages, partition=cuts)
        one = made(settings, name)
        assert one.stages == stages
        alone = [Alone(one, k) for k in range(stages)]
        before = params(one)
        one.turn(1)
        assert not any(np.array_equal(a, b) for a, b in zip(before, params(one), strict=True))
        for k, stage in enumerate(alone):
            assert turn([stage], 1) > 0
            own = jax.tree.leaves((stage.state.stages[k].params, stage.state.stages[k].model_state))
            real = one.state.stages[k]
            for a, b in zip(own, jax.tree.leaves((real.params, real.model_state)), strict=True):
                np.testing.assert_array_equal(a, b)
            # And on: it must not run out of messages, nor keep them.
            turn([stage], 3)
            assert stage.state.stages[k].version == one.state.stages[k].version + 3
            held = [len(own.state.stages[k].flights.items()) for own in (stage, one)]
            assert held[0] == held[1]
        turn(alone, 2)
        versions = [stage.state.stages[k].version for k, stage in enumerate(alone)]
        assert versions == [one.state.stages[k].version + 5 for k in range(stages)]


def test_every_split_is_made_from_the_same_costs(tiny, monkeypatch):
    calls = []
    costs = (1.0, 5.0, 1.0, 5.0, 1.0, 5.0)
    real = fdg.partition

    def partition(layers, k, example, cost="flops"):
        if cost == "time":
            calls.append(k)
            cost = costs
        return real(layers, k, example, cost=cost)

    monkeypatch.setattr(fdg, "partition", partition)
    work = Workload(dataclasses.replace(tiny, partition="time"))
    assert work.split(3).cuts == (2, 4)
    assert work.split(2).costs == (7.0, 11.0)
    assert work.layer_costs == costs
    assert calls == [1]
    given = Workload(tiny)
    assert given.split(2).cuts == (3,)
    assert len(given.split(4)) == 4
    assert calls == [1]
    assert jnp.asarray(given.inputs).dtype == jnp.float32


def test_a_contender_that_saves_trains_no_other_way(tiny, monkeypatch):
    monkeypatch.setattr(contender.Saving, "EVERY", 4)
    saving = made(tiny, "fdg_saving", steps=11)
    assert saving.checkpointer.latest() == 10
    assert same(saving, made(tiny, "fdg", steps=11), rtol=0, atol=0)
    saving.close()
    assert not saving.checkpointer.directory.exists()
