"""Stages with heads and losses of their own (DGL)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.layer import batch_key
from fdg_jax.partition.layerwise import separate
from tests import networks
from tests.thinned import thinned

DATA = networks.batches(12)


def head() -> fdg.Layer:
    """State and noise of its own."""
    return fdg.chain(
        [networks.batch_norm(), networks.dropout(), networks.dense(networks.CLASSES, lambda x: x)]
    )


def headed(num_stages: int):
    plain = fdg.partition(networks.network(), num_stages, DATA[0][0], cost=[1] * 7)
    return [*(fdg.with_head(stage, head()) for stage in plain[:-1]), plain[-1]]


def pipeline(num_stages: int) -> fdg.Pipeline:
    losses = [networks.loss_fn] * num_stages
    return fdg.Pipeline(
        headed(num_stages), losses, networks.sgd(1, num_stages), fdg.schedule.local(num_stages)
    )


@pytest.mark.parametrize("num_stages", thinned([2, 3, 4], keep=2))
def test_equals_separate_plain_loops(num_stages):
    """Each stage is trained alone, to the end, on what the one before it gave at the time."""
    pipe, key = pipeline(num_stages), jax.random.key(7)
    start = pipe.init(key, *DATA[0])
    params, states = jax.device_get(
        ([s.params for s in start.stages], [s.model_state for s in start.stages])
    )
    state, metrics = networks.run(pipe, DATA, key)
    inputs = [x for x, _ in DATA]
    first = 0
    for k, stage in enumerate(headed(num_stages)):
        layer = stage.at(first)
        first += stage.size
        p, s = params[k], states[k]
        optimizer = networks.sgd(1, num_stages)(k)
        moments, outputs, losses = optimizer.init(p), [], []
        for n, (x, (_, labels)) in enumerate(zip(inputs, DATA, strict=True)):

            def loss(p, layer=layer, s=s, x=x, n=n, labels=labels):
                noise = batch_key(key, n)
                y, left = layer.apply(p, s, x, train=True, key=noise)
                scores, left = layer.scores(p, left, y, train=True, key=noise)
                return networks.loss_fn(scores, labels)[0], (y, left)

            (value, (y, s)), gradient = jax.value_and_grad(loss, has_aux=True)(p)
            updates, moments = optimizer.update(gradient, moments, p)
            p = optax.apply_updates(p, updates)
            outputs.append(y)
            losses.append(value)
        inputs = outputs
        assert networks.difference(state.stages[k].params, p) <= 1e-12
        assert networks.difference(state.stages[k].model_state, s) <= 1e-12
        own = sorted((m for m in metrics if m.stage == k), key=lambda m: m.batch)
        assert networks.difference([m.loss for m in own], losses) <= 1e-12


def test_equals_the_oracle():
    networks.assert_equals_oracle(
        headed(3), networks.sgd(1, 3), fdg.schedule.local(3), DATA, loss=[networks.loss_fn] * 3
    )


def test_messages_go_up_only_and_every_stage_tells_its_error():
    pipe = pipeline(3)
    state = pipe.init(jax.random.key(0), *DATA[0])
    for batch in DATA[:5]:
        state, metrics = pipe.step(state, batch)
    assert all("cotangent" not in own.inbox for own in state.stages)
    assert sorted((m.stage, m.batch) for m in metrics) == [(0, 4), (1, 3), (2, 2)]
    assert all(set(m.aux) == {"error"} for m in metrics)


def test_prediction_and_layers_leave_heads_out():
    pipe = pipeline(2)
    state = pipe.init(jax.random.key(0), *DATA[0])
    plain = fdg.partition(networks.network(), 2, DATA[0][0], cost=[1] * 7)
    (first, _), last = jax.device_get([own.params for own in state.stages])
    (own, _), rest = jax.device_get([own.model_state for own in state.stages])
    y, _ = plain[0].apply(first, own, DATA[0][0], train=False, key=None)
    expected, _ = plain[1].apply(last, rest, y, train=False, key=None)
    np.testing.assert_allclose(pipe.predict(state, DATA[0][0]), expected, rtol=1e-12)
    stage = headed(2)[0]
    layers = separate(stage, state.stages[0].params)
    assert networks.difference(layers, separate(plain[0], first)) == 0
    assert len(layers) == stage.size == plain[0].size


def test_a_head_does_not_move_the_initial_weights():
    stages = headed(2), fdg.partition(networks.network(), 2, DATA[0][0], cost=[1] * 7)
    with_heads, without = (
        s[0].at(3).init(jax.random.key(1), jnp.asarray(DATA[0][0]))[0] for s in stages
    )
    assert networks.difference(with_heads[0], without) == 0
