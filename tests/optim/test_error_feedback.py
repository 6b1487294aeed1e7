"""Error feedback: its recursion, and last-update prediction seen from the other iterate."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from tests.optim.recursion import rate, run, two_variables


@pytest.mark.parametrize("delay", [1, 2, 6])
def test_it_takes_the_last_correction_back_and_makes_a_new_one(delay):
    state = {"v": 0.0, "last": 0.0}

    def advance(x, g, step):
        state["v"] = 0.9 * state["v"] + g
        u, old = -rate(step) * state["v"], state["last"]
        state["last"] = u
        return x + (1 + delay) * u - delay * old

    want, _ = two_variables(advance, lambda x, t: x, delay)
    optimizer = optax.chain(optax.sgd(rate, momentum=0.9), fdg.error_feedback(delay))
    np.testing.assert_allclose(run(optimizer, delay)[0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("delay", [1, 2, 6])
@pytest.mark.parametrize(
    "inner", [optax.sgd(rate, momentum=0.9), optax.adam(rate)], ids=["sgd", "adam"]
)
def test_it_is_last_update_prediction_where_updates_do_not_read_the_parameters(inner, delay):
    feedback, state = run(optax.chain(inner, fdg.error_feedback(delay)), delay)
    predicted, _ = run(fdg.predict_weights(inner, delay, "last_update"), delay)
    np.testing.assert_allclose(feedback, predicted, rtol=0, atol=1e-13)
    # Its parameters are the iterate that is evaluated.
    np.testing.assert_array_equal(fdg.true_params(feedback[-1], state), feedback[-1])


def test_decay_that_reads_the_parameters_acts_on_another_iterate():
    inner = optax.adamw(rate, weight_decay=0.1)
    feedback, _ = run(optax.chain(inner, fdg.error_feedback(4)), 4)
    predicted, _ = run(fdg.predict_weights(inner, 4, "last_update"), 4)
    assert np.abs(feedback - predicted).max() > 1e-6


def test_without_staleness_it_changes_nothing():
    inner = optax.sgd(rate, momentum=0.9)
    found, plain = run(optax.chain(inner, fdg.error_feedback(0)), 0)[0], run(inner, 0)[0]
    np.testing.assert_array_equal(found, plain)


def test_staleness_must_be_a_number():
    with pytest.raises(ValueError, match="staleness=-1"):
        fdg.error_feedback(-1)
    optimizer = fdg.error_feedback((fdg.schedule.ddg(3), 0))
    updates, _ = optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)))
    np.testing.assert_array_equal(updates, 3.0)


def test_the_state_keeps_the_dtype_of_the_parameters():
    optimizer = optax.chain(optax.sgd(rate, momentum=0.9), fdg.error_feedback(2))
    params = jnp.ones(3, jnp.bfloat16)
    state = optimizer.init(params)
    _, after = optimizer.update(params, state, params)
    assert after[1].last.dtype == state[1].last.dtype == jnp.bfloat16
