"""The moving average of the weights: against its recursion, in a pipeline, in checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.checkpoint import Checkpointer, convert, manifest, weights
from fdg_jax.partition.layerwise import separate
from tests import networks

DECAY = 0.8
DATA = networks.batches(8)
X = DATA[0][0]


def gradients(n):
    return [np.float64(g) for g in np.random.default_rng(0).normal(size=n)]


def chains():
    """Optimizers that keep an average; predictions inside of it, around it, or none."""
    sgd = optax.sgd(0.1, momentum=0.9)
    return {
        "plain": fdg.average_weights(sgd, DECAY),
        "inside": fdg.average_weights(fdg.predict_weights(sgd, 3), DECAY),
        "around": fdg.predict_weights(fdg.average_weights(sgd, DECAY), 3),
        "delayed": fdg.average_weights(fdg.delayed_sgd(0.1, 0.9, 3), DECAY),
    }


@pytest.mark.parametrize("name", chains())
def test_recursion(name):
    with jax.enable_x64(True):
        optimizer = chains()[name]
        params = {"w": jnp.float64(1.0)}
        state, average = optimizer.init(params), 1.0
        for g in gradients(12):
            updates, state = optimizer.update({"w": g}, state, params)
            params = optax.apply_updates(params, updates)
            average = DECAY * average + (1 - DECAY) * float(fdg.true_params(params, state)["w"])
            found = float(fdg.averaged_params(params, state)["w"])
            np.testing.assert_allclose(found, average, rtol=1e-12)


def test_updates_are_those_of_the_optimizer():
    plain = optax.adam(0.1)
    kept = fdg.average_weights(plain, DECAY)
    params = {"w": jnp.ones(3)}
    one, two = plain.init(params), kept.init(params)
    for g in gradients(4):
        a, one = plain.update({"w": jnp.full(3, g)}, one, params)
        b, two = kept.update({"w": jnp.full(3, g)}, two, params)
        np.testing.assert_array_equal(a["w"], b["w"])


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="decay="):
        fdg.average_weights(optax.sgd(0.1), decay)


def test_no_average():
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"fdg_jax\.average_weights"):
        fdg.averaged_params(params, optax.sgd(0.1).init(params))


def pipeline(schedule):
    def optimizer(k):
        inner = fdg.predict_weights(optax.sgd(0.1, momentum=0.9), (schedule, k))
        return fdg.average_weights(inner, DECAY)

    stages = fdg.partition(networks.network(), schedule.num_stages, X)
    pipe = fdg.Pipeline(stages, networks.loss_fn, optimizer, schedule, jax.devices())
    return pipe, optimizer, stages


def test_pipeline_and_checkpoint(tmp_path):
    schedule = fdg.schedule.fdg(2)
    pipe, optimizer, stages = pipeline(schedule)
    state = pipe.init(jax.random.key(0), *DATA[0])
    average = [jax.tree.map(np.array, own) for own in pipe.true_params(state)]
    before = [int(own.version) for own in state.stages]
    for batch in DATA:
        state, _ = pipe.step(state, batch)
        for k, own in enumerate(pipe.true_params(state)):
            if int(state.stages[k].version) > before[k]:
                before[k] += 1
                average[k] = jax.tree.map(
                    lambda a, w: DECAY * a + (1 - DECAY) * np.asarray(w), average[k], own
                )
    for expected, found in zip(average, pipe.averaged_params(state), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, found)
    averages = jax.device_get(pipe.averaged_params(state))
    outputs = pipe.predict(state, X, pipe.averaged_params(state))
    model_state = tuple(jax.device_get(pipe.model_state(state)))
    alone, _ = pipe.network.apply(tuple(averages), model_state, X, train=False, key=None)
    np.testing.assert_allclose(outputs, alone, atol=1e-6)
    assert np.any(np.asarray(outputs) != np.asarray(pipe.predict(state, X)))

    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, 8)
    folder = manifest.folder(tmp_path, 8)
    read = weights.read(folder, stages, X, optimizer, averaged=True)
    jax.tree.map(np.testing.assert_array_equal, read.params, averages)
    with pytest.raises(ValueError, match="optimizer:"):
        weights.read(folder, stages, X, averaged=True)


def test_another_number_of_stages_keeps_it():
    two, _, stages = pipeline(fdg.schedule.fdg(2))
    one, _, whole = pipeline(fdg.schedule.backprop(1))
    state = two.init(jax.random.key(0), *DATA[0])
    for batch in DATA:
        state, _ = two.step(state, batch)
    state, _ = two.drain(state)
    expected = separate(fdg.chain(stages), tuple(jax.device_get(two.averaged_params(state))))
    found = one.averaged_params(convert(two, state, one, X))
    found = separate(fdg.chain(whole), tuple(jax.device_get(found)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_replaced_weights_begin_anew():
    pipe, *_ = pipeline(fdg.schedule.fdg(2))
    state = pipe.init(jax.random.key(0), *DATA[0])
    for batch in DATA:
        state, _ = pipe.step(state, batch)
    state, _ = pipe.drain(state)
    given = [jax.tree.map(lambda v: np.array(v) + 1, own) for own in pipe.true_params(state)]
    state = pipe.replace_params(state, given)
    for found in (pipe.true_params(state), pipe.averaged_params(state)):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), given)
    state, _ = pipe.step(state, DATA[0])  # weights and average are two buffers
    pipe.drain(state)
