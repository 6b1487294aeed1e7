"""Weight prediction against the two-variable form in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import optim
from tests.optim.recursion import gradient, rate, run, start, two_variables

DELAYS = [1, 3, 6]


class Momentum:
    """SGD with L2 decay and momentum, by hand."""

    def __init__(self, m=0.9, decay=0.0):
        self.m, self.decay, self.v, self.last = m, decay, 0.0, 0.0

    def advance(self, w, g, step):
        self.v = self.m * self.v + g + self.decay * w
        self.last = -rate(step) * self.v
        return w + self.last


class AdamW:
    """AdamW, by hand."""

    def __init__(self, b1=0.9, b2=0.95, eps=1e-8, decay=0.1):
        self.b1, self.b2, self.eps, self.decay = b1, b2, eps, decay
        self.m = self.v = self.last = 0.0

    def advance(self, w, g, step):
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        first, second = (
            x / (1 - b ** (step + 1)) for x, b in ((self.m, self.b1), (self.v, self.b2))
        )
        self.last = -rate(step) * (first / (np.sqrt(second) + self.eps) + self.decay * w)
        return w + self.last

    def ahead(self, w, t, n):
        for i in range(1, n + 1):
            lr = rate(t + i - 1)
            w = w * (1 - lr * self.decay)
            second = self.v / (1 - self.b2 ** (t + i))
            first = self.b1**i * self.m / (1 - self.b1 ** (t + i))
            w = w - lr * first / (np.sqrt(second) + self.eps)
        return w


def sgd(decay=0.0):
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))


@pytest.mark.parametrize("horizon", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("delay", DELAYS)
def test_last_update_with_sgd(delay, horizon):
    hand = Momentum(decay=0.01)
    want, true = two_variables(hand.advance, lambda w, t: w + horizon * delay * hand.last, delay)
    optimizer = fdg.predict_weights(sgd(0.01), delay, horizon=horizon)
    found, state = run(optimizer, delay)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fdg.true_params(found[-1], state), true[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("delay", DELAYS)
def test_last_update_with_adamw_whose_decay_acts_on_the_true_weights(delay):
    hand = AdamW()
    want, true = two_variables(hand.advance, lambda w, t: w + delay * hand.last, delay)
    inner = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1)
    found, state = run(fdg.predict_weights(inner, delay), delay)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fdg.true_params(found[-1], state), true[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("delay", DELAYS)
def test_momentum_is_the_momentum_sum_at_the_rates_of_the_coming_updates(delay):
    hand = Momentum()

    def ahead(w, t):
        return w - sum(rate(t + i - 1) * 0.9**i for i in range(1, delay + 1)) * hand.v

    want, _ = two_variables(hand.advance, ahead, delay)
    found, _ = run(fdg.predict_weights(sgd(), delay, "momentum"), delay)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)


def test_momentum_at_a_constant_rate_has_the_closed_form():
    m, lr, d = 0.9, 0.02, 6
    optimizer = fdg.predict_weights(optax.sgd(lr, momentum=m), d, "momentum")
    params, g = jnp.asarray(start()), jnp.asarray(gradient(start(), 0))
    _, state = optimizer.update(g, optimizer.init(params), params)
    want = -lr * g * (m - m ** (d + 1)) / (1 - m)
    np.testing.assert_allclose(state.displacement, want, rtol=1e-12)


@pytest.mark.parametrize("delay", DELAYS)
def test_momentum_with_decay_unrolls_it(delay):
    decay, hand = 0.05, Momentum(decay=0.05)

    def ahead(w, t):
        v = hand.v
        for i in range(1, delay + 1):
            v = 0.9 * v + decay * w
            w = w - rate(t + i - 1) * v
        return w

    want, true = two_variables(hand.advance, ahead, delay)
    found, state = run(fdg.predict_weights(sgd(decay), delay, "momentum"), delay)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fdg.true_params(found[-1], state), true[-1], rtol=0, atol=1e-12)


def test_a_part_of_an_update_is_that_part_of_the_last_one():
    params, g = jnp.asarray(start()), jnp.asarray(gradient(start(), 0))
    ahead = {}
    for n in (2, 2.25, 3):
        optimizer = fdg.predict_weights(sgd(), n, "momentum")
        ahead[n] = optimizer.update(g, optimizer.init(params), params)[1].displacement
    np.testing.assert_allclose(ahead[2.25], 0.75 * ahead[2] + 0.25 * ahead[3], rtol=1e-12)


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_displacement(delay, decay):
    hand = AdamW(decay=decay)
    want, true = two_variables(hand.advance, lambda w, t: hand.ahead(w, t, delay), delay)
    inner = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=decay)
    ahead = optim.adam_displacement(rate, b1=0.9, b2=0.95, weight_decay=decay)
    found, state = run(fdg.predict_weights(inner, delay, ahead), delay)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fdg.true_params(found[-1], state), true[-1], rtol=0, atol=1e-12)


def test_adam_displacement_decays_what_the_mask_says():
    params = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
    mask = {"kernel": True, "bias": False}
    inner = optax.adamw(0.1, weight_decay=0.5, mask=mask)
    zero = jax.tree.map(jnp.zeros_like, params)
    for given in (mask, lambda _: mask):
        ahead = optim.adam_displacement(0.1, weight_decay=0.5, mask=given)
        found = ahead(inner.init(params), params, 2)
        np.testing.assert_allclose(found["kernel"], 0.95**2 - 1, rtol=1e-12)
        np.testing.assert_array_equal(found["bias"], zero["bias"])


def test_a_displacement_of_ones_own_sees_state_true_weights_and_updates_ahead():
    seen = []

    def ahead(state, params, n):
        seen.append((jax.tree.structure(state), n))
        return jax.tree.map(lambda p: 0.01 * n * p, params)

    inner = sgd()
    optimizer = fdg.predict_weights(inner, 2, ahead, horizon=1.5)
    params = jnp.asarray(start())
    updates, state = optimizer.update(jnp.ones(5), optimizer.init(params), params)
    true, _ = inner.update(jnp.ones(5), inner.init(params), params)
    np.testing.assert_allclose(params + updates, 1.03 * (params + true), rtol=1e-12)
    assert seen == [(jax.tree.structure(inner.init(params)), 3.0)]
    np.testing.assert_allclose(fdg.true_params(params + updates, state), params + true, rtol=1e-12)


@pytest.mark.parametrize("kind", ["last_update", "momentum", lambda s, p, n: 1 / 0])
def test_without_staleness_or_horizon_it_is_the_optimizer_bit_for_bit(kind):
    for late, horizon in ((0, 1.0), (3, 0.0)):
        plain, _ = run(sgd(0.01), 0)
        found, state = run(fdg.predict_weights(sgd(0.01), late, kind, horizon), 0)
        np.testing.assert_array_equal(found, plain)
        np.testing.assert_array_equal(fdg.true_params(found[-1], state), plain[-1])


def test_a_schedule_and_a_stage_stand_for_the_staleness():
    for rule in (fdg.schedule.fdg(3), fdg.schedule.fdg(3, "backward_first"), fdg.schedule.ddg(3)):
        for k in range(3):
            found, _ = run(fdg.predict_weights(sgd(), (rule, k)), 2)
            want, _ = run(fdg.predict_weights(sgd(), rule.staleness(k)), 2)
            np.testing.assert_array_equal(found, want)
    # Two gradients of different age in one update: their mean.
    assert optim.updates_late((fdg.schedule.adl(2, accumulate=4), 0)) == pytest.approx(0.5)


def test_true_params_are_found_wherever_the_prediction_stands():
    params = {"a": jnp.ones(2), "b": jnp.full(2, 2.0)}
    g = {"a": jnp.ones(2), "b": jnp.ones(2)}
    predicts = fdg.predict_weights(optax.sgd(0.1), 2)
    labels = {"a": "late", "b": "fresh"}
    optimizers = {
        "chain": (optax.chain(optax.clip_by_global_norm(100.0), predicts), True),
        "partition": (optax.partition({"late": predicts, "fresh": optax.sgd(0.1)}, labels), False),
        "both parts": (optax.partition({"late": predicts, "fresh": predicts}, labels), True),
        "accumulated": (optax.MultiSteps(predicts, 1).gradient_transformation(), True),
        "injected": (
            optax.inject_hyperparams(
                lambda rate: fdg.predict_weights(optax.sgd(rate), 2), static_args=()
            )(0.1),
            True,
        ),
        "sgd": (
            optax.partition(
                {"late": fdg.delayed_sgd(0.1, 0.0, 2, stretch=0), "fresh": optax.sgd(0.1)}, labels
            ),
            False,
        ),
    }
    for name, (optimizer, both) in optimizers.items():
        updates, state = optimizer.update(g, optimizer.init(params), params)
        found = fdg.true_params(optax.apply_updates(params, updates), state)
        np.testing.assert_allclose(found["a"], 0.9, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(found["b"], 1.9, rtol=1e-6, err_msg=name)
        moved = optax.apply_updates(params, updates)
        assert (float(moved["b"][0]) == pytest.approx(1.7)) == both, name
        anew, fresh = optim.without_prediction(moved, state)
        np.testing.assert_allclose(anew["a"], 0.9, rtol=1e-6, err_msg=name)
        jax.tree.map(np.testing.assert_array_equal, fdg.true_params(anew, fresh), anew)


def test_a_state_that_predicts_nothing_leaves_the_parameters_as_they_are():
    params = {"a": jnp.ones(2)}
    for optimizer in (optax.adamw(0.1), fdg.error_feedback(2), optax.identity()):
        assert fdg.true_params(params, optimizer.init(params)) is params


def test_gradients_are_accumulated_outside_of_the_prediction():
    optimizer = optax.MultiSteps(fdg.predict_weights(optax.sgd(0.1), 2), 2)
    params = jnp.ones(())
    state, seen = optimizer.init(params), []
    for _ in range(4):
        updates, state = optimizer.update(jnp.ones(()), state, params)
        params = optax.apply_updates(params, updates)
        seen.append((float(params), float(fdg.true_params(params, state))))
    np.testing.assert_allclose(seen, [(1, 1), (0.7, 0.9), (0.7, 0.9), (0.6, 0.8)], atol=1e-12)


def test_a_traced_staleness_is_refused_with_the_remedy():
    inject = optax.inject_hyperparams(lambda late: fdg.predict_weights(optax.sgd(0.1), late))(2)
    state = inject.init(jnp.ones(1))
    with pytest.raises(ValueError, match=r"staleness: must be a Python number.*static_args"):
        jax.jit(inject.update)(jnp.ones(1), state, jnp.ones(1))


def test_adam_displacement_is_for_adam():
    optimizer = fdg.predict_weights(optax.sgd(0.1), 2, optim.adam_displacement(0.1))
    with pytest.raises(ValueError, match="has 0 states of Adam, not one"):
        optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)), jnp.ones(1))


def test_extra_arguments_reach_the_optimizer():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    for kind in ("last_update", "momentum"):
        optimizer = fdg.predict_weights(inner, 2, kind)
        optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)), jnp.ones(1), value=7)
    assert set(seen) == {7}


def test_dtypes_of_parameters_and_updates_are_kept():
    params = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(2, jnp.float32)}
    for kind in ("last_update", "momentum"):
        optimizer = fdg.predict_weights(optax.sgd(rate, momentum=0.9), 2.5, kind)
        updates, state = optimizer.update(params, optimizer.init(params), params)
        assert updates["half"].dtype == jnp.bfloat16
        assert updates["single"].dtype == jnp.float32
        before, after = (jax.tree.map(jnp.result_type, s) for s in (optimizer.init(params), state))
        assert before == after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"staleness": -1}, r"staleness=-1: must be a number of updates >= 0"),
        ({"staleness": float("nan")}, "staleness=nan"),
        ({"staleness": "2"}, "staleness=2: must be a number"),
        ({"staleness": 2, "horizon": -1}, "horizon=-1: must be a number, at least 0"),
        ({"staleness": 2, "displacement": "momentums"}, "displacement='momentums': allowed are"),
        ({"staleness": None}, "staleness=None"),
        (
            {"staleness": fdg.schedule.fdg(2)},
            "^staleness: is a Schedule: must be a number of .*FDG$",
        ),
        ({"staleness": (0, fdg.schedule.fdg(2))}, "staleness: is a tuple: must be a number"),
        ({"staleness": optax.sgd(0.1)}, "staleness: is a .*: must be a number"),
        ({"staleness": (fdg.schedule.fdg(2), 2)}, "k=2: schedule fdg has stages 0 to 1"),
    ],
)
def test_what_is_no_prediction_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fdg.predict_weights(sgd(), **arguments)


def test_parameters_are_asked_for():
    optimizer = fdg.predict_weights(sgd(), 2)
    with pytest.raises(ValueError, match="params"):
        optimizer.update(jnp.ones(5), optimizer.init(jnp.ones(5)))


@pytest.mark.parametrize("wrap", [fdg.predict_weights, fdg.average_weights, fdg.track_changes])
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.sgd, r"^optimizer: sgd is a function, no optax transformation; .*optax.sgd\(0.1\)$"),
        (0.1, "^optimizer: 0.1 is no optax transformation"),
    ],
)
def test_what_is_no_optimizer_is_refused(wrap, optimizer, message):
    with pytest.raises(ValueError, match=message):
        wrap(optimizer, 0.5)


def test_true_params_in_the_wrong_order_are_refused():
    for optimizer in (fdg.predict_weights(sgd(), 2), fdg.delayed_sgd(0.1, 0.9, 2)):
        params = jnp.ones(5)
        with pytest.raises(ValueError, match=r"the order is true_params\(params, opt_state\)"):
            fdg.true_params(optimizer.init(params), params)
