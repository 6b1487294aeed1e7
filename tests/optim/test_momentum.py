"""Stretched momentum, spike compensation and SGD with all remedies, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from tests.optim.recursion import rate, run, start, two_variables


def test_stretched_momentum_keeps_the_total_response():
    for delay, want in ((6, 0.975), (4, 1 - 0.1 / 3), (2, 0.95), (0, 0.9)):
        momentum, factor = fdg.stretched_momentum(0.9, delay, 0.5)
        assert momentum == pytest.approx(want, rel=1e-12)
        assert factor / (1 - momentum) == pytest.approx(1 / (1 - 0.9), rel=1e-12)
    assert fdg.stretched_momentum(0.9, 5, 0) == (0.9, 1.0)
    assert fdg.stretched_momentum(0.8, (fdg.schedule.fdg(4), 0)).momentum == pytest.approx(0.95)


def spike_by_hand(m, delay):
    state = {"v": 0.0}
    a, b = m**delay, (1 - m**delay) / (1 - m)

    def advance(w, g, step):
        state["v"] = m * state["v"] + g
        return w - rate(step) * (a * state["v"] + b * g)

    return advance


@pytest.mark.parametrize("delay", [1, 3, 6])
def test_spike_compensation(delay):
    want, _ = two_variables(spike_by_hand(0.9, delay), lambda w, t: w, delay)
    optimizer = optax.chain(
        fdg.scale_by_spike_compensation(0.9, delay), optax.scale_by_learning_rate(rate)
    )
    np.testing.assert_allclose(run(optimizer, delay)[0], want, rtol=0, atol=1e-12)


def test_spike_compensation_of_one_update_is_nesterovs_momentum():
    ours, theirs = (
        run(optax.chain(trace, optax.scale_by_learning_rate(rate)), 1)[0]
        for trace in (fdg.scale_by_spike_compensation(0.9, 1), optax.trace(0.9, nesterov=True))
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-14)


def test_spike_compensation_keeps_the_total_response():
    optimizer = fdg.scale_by_spike_compensation(0.9, 4)
    state, total = optimizer.init(jnp.zeros(())), 0.0
    for g in [1.0] + [0.0] * 400:
        u, state = optimizer.update(jnp.asarray(g), state)
        total += float(u)
    assert total == pytest.approx(10, rel=1e-12)


@pytest.mark.parametrize("spike", [False, True])
@pytest.mark.parametrize("horizon", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stretch", [0.0, 0.5])
@pytest.mark.parametrize("delay", [1, 2, 6])
def test_delayed_sgd(delay, stretch, horizon, spike):
    m = 1 - 0.1 / (1 + stretch * delay)
    factor, decay = 1 / (1 + stretch * delay), 0.03
    a, b = (m**delay, (1 - m**delay) / (1 - m)) if spike else (1, 0)
    state = {"v": np.zeros(5)}

    def advance(w, g, step):
        g = g + decay * w
        state["v"] = m * state["v"] + g
        return w - factor * rate(step) * (a * state["v"] + b * g)

    def ahead(w, t):
        return w - factor * rate(t) * horizon * delay * state["v"]

    want, true = two_variables(advance, ahead, delay)
    optimizer = fdg.delayed_sgd(rate, 0.9, delay, stretch, horizon, spike, decay)
    found, last = run(optimizer, delay)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fdg.true_params(found[-1], last), true[-1], rtol=0, atol=1e-12)


def test_where_the_rate_has_ended_at_zero_parameters_and_true_weights_coincide():
    optimizer = fdg.delayed_sgd(optax.cosine_decay_schedule(0.02, 30), 0.9, 6)
    found, state = run(optimizer, 6, steps=30)
    np.testing.assert_array_equal(fdg.true_params(found[-1], state), found[-1])


@pytest.mark.parametrize("learning_rate", [0.02, rate])
@pytest.mark.parametrize("decay", [0.0, 5e-4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_without_staleness_each_is_sgd_bit_for_bit(learning_rate, decay, momentum, dtype):
    decays = [optax.add_decayed_weights(decay)] if decay else []
    plain = optax.chain(*decays, optax.sgd(learning_rate, momentum=momentum))
    compensated = optax.chain(
        *decays,
        fdg.scale_by_spike_compensation(momentum, 0),
        optax.scale_by_learning_rate(learning_rate),
    )
    whole = fdg.delayed_sgd(learning_rate, momentum, 0, weight_decay=decay)
    finals = []
    for optimizer in (plain, compensated, whole):
        params = jnp.asarray(start((40,)), dtype)
        state = optimizer.init(params)

        @jax.jit
        def step(params, state, g, optimizer=optimizer):
            updates, state = optimizer.update(g, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(12):
            params, state = step(params, state, jnp.sin(3 * params))
        finals.append(params)
    np.testing.assert_array_equal(finals[1], finals[0])
    np.testing.assert_array_equal(finals[2], finals[0])


def test_the_memory_is_that_of_sgd_with_momentum():
    params = jnp.ones((100, 100))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(fdg.delayed_sgd(0.1, 0.9, 6).init(params)))
    assert size <= params.nbytes + 16


def test_half_precision_stays():
    params = jnp.ones(3, jnp.bfloat16)
    optimizer = fdg.delayed_sgd(rate, 0.9, 4, weight_decay=0.1)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert updates.dtype == state.trace.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fdg.delayed_sgd(0.1, 1.0, 2), "momentum=1.0: must be a number, at least 0 and"),
        (lambda: fdg.delayed_sgd(0.1, 0.9, -2), "staleness=-2"),
        (lambda: fdg.delayed_sgd(0.1, 0.9, 2, stretch=-1), "stretch=-1"),
        (lambda: fdg.delayed_sgd(0.1, 0.9, 2, horizon=float("inf")), "horizon=inf"),
        (lambda: fdg.delayed_sgd(0.1, 0.9, 2, weight_decay=-1), "weight_decay=-1"),
        (lambda: fdg.scale_by_spike_compensation(-0.1, 2), "momentum=-0.1"),
        (lambda: fdg.stretched_momentum(2, 2), "momentum=2"),
        (lambda: fdg.stretched_momentum([0.9], 2), r"momentum=\[0.9\]"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weight_decay_asks_for_the_parameters():
    optimizer = fdg.delayed_sgd(0.1, 0.9, 2, weight_decay=0.1)
    with pytest.raises(ValueError, match="params: weight decay needs"):
        optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)))
