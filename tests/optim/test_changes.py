"""The average of an optimizer's updates, and weights of earlier from it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.optim import ChangesState
from tests.optim.recursion import gradient, rate, run, start

INNER = optax.sgd(rate, momentum=0.9)


@pytest.mark.parametrize("decay", [0, 0.6, 0.98])
def test_the_average_is_the_recursion_and_the_updates_stay(decay):
    optimizer = fdg.track_changes(INNER, decay)
    plain = run(INNER, 0)[0]
    found, state = run(optimizer, 0)
    np.testing.assert_array_equal(found, plain)
    average = np.zeros_like(start())
    for old, new in itertools.pairwise(found):
        average = decay * average + (1 - decay) * (new - old)
    np.testing.assert_allclose(state.average, average, rtol=0, atol=1e-15)
    past = fdg.past_params(found[-1], state, 3)
    np.testing.assert_allclose(past, found[-1] - 3 * average, rtol=0, atol=1e-14)


def test_equal_changes_give_the_weights_exactly_in_the_limit():
    optimizer = fdg.track_changes(optax.sgd(0.1), 0.135 ** (1 / 4))
    params = {"w": jnp.ones(3)}
    state, path = optimizer.init(params), [params]
    for _ in range(80):
        updates, state = optimizer.update({"w": jnp.ones(3)}, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    for ago in (0, 1, 4):
        past = fdg.past_params(params, state, ago)
        np.testing.assert_allclose(past["w"], path[-1 - ago]["w"], rtol=0, atol=1e-12)


def test_it_is_found_wherever_it_stands():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tracked = fdg.track_changes(optax.sgd(0.1), 0)
    labels = {"a": "tracked", "b": "plain"}
    parts = optax.partition({"tracked": tracked, "plain": optax.sgd(0.1)}, labels)
    stage = fdg.StageOptimizer(
        optax.with_extra_args_support(optax.chain(optax.clip(1.0), parts)),
        per_gradient=optax.with_extra_args_support(optax.clip(1.0)),
    )
    state = stage.init(params)
    updates, state = stage.update(params, state, params)
    past = fdg.past_params(optax.apply_updates(params, updates), state, 1)
    np.testing.assert_allclose(past["a"], 1.0)
    np.testing.assert_allclose(past["b"], 0.9)  # nobody tracks it


def test_it_goes_around_an_optimizer_that_predicts():
    optimizer = fdg.track_changes(fdg.predict_weights(INNER, 2), 0.5)
    params = jnp.asarray(start())
    first = jnp.asarray(gradient(start(), 0))
    updates, state = optimizer.update(first, optimizer.init(params), params)
    params = optax.apply_updates(params, updates)
    true = fdg.true_params(params, state)
    np.testing.assert_allclose(true, params - state.inner.displacement)
    np.testing.assert_allclose(state.average, updates / 2)


def test_the_state_keeps_the_dtype_of_the_parameters():
    optimizer = fdg.track_changes(INNER, 0.5)
    params = jnp.ones(3, jnp.bfloat16)
    state = optimizer.init(params)
    _, after = optimizer.update(params, state, params)
    assert isinstance(after, ChangesState)
    assert after.average.dtype == state.average.dtype == jnp.bfloat16
    past = jax.jit(fdg.past_params)(params, after, jnp.float32(2))
    assert past.dtype == jnp.bfloat16


def test_extra_arguments_reach_the_optimizer():
    optimizer = fdg.track_changes(optax.chain(fdg.delay_compensation(0.5), optax.sgd(0.1)), 0.5)
    now, then = jnp.ones(()), jnp.zeros(())
    updates, _ = optimizer.update(now, optimizer.init(now), now, stale_params=then)
    np.testing.assert_allclose(updates, -0.15)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan"), "half"])
def test_decay_is_checked(decay):
    with pytest.raises(ValueError, match=f"decay={decay}"):
        fdg.track_changes(optax.sgd(0.1), decay)


def test_an_optimizer_that_does_not_track_is_named():
    params = jnp.ones(2)
    with pytest.raises(ValueError, match="wrap the optimizer in track_changes"):
        fdg.past_params(params, optax.sgd(0.1).init(params), 1)
