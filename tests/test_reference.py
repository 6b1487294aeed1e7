"""The pipeline against the oracle, in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import reference
from fdg_jax.schedule import Action, Schedule
from tests import networks
from tests.thinned import thinned


@pytest.mark.parametrize(
    ("num_stages", "order", "beta"),
    thinned([1, 2, 3, 4, 5, 6], ["forward_first", "backward_first"], [0.3, 1.0]),
)
def test_fdg_equals_the_oracle(num_stages, order, beta):
    data = networks.batches(32)
    stages = fdg.partition(networks.network(), num_stages, data[0][0], cost=[1] * 7)
    schedule = fdg.schedule.fdg(num_stages, order)
    networks.assert_equals_oracle(stages, networks.sgd(beta, num_stages), schedule, data)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_backprop_equals_the_oracle(num_stages):
    data = networks.batches(30)
    stages = fdg.partition(networks.network(), num_stages, data[0][0], cost=[1] * 7)
    schedule = fdg.schedule.backprop(num_stages)
    networks.assert_equals_oracle(stages, networks.sgd(1, num_stages), schedule, data)


@pytest.mark.slow
@hypothesis.settings(max_examples=6)
@hypothesis.given(st.data())
def test_random_networks_and_cuts_equal_the_oracle(draws):
    kinds = st.sampled_from(["dense", "batch_norm", "dropout", "repeat"])
    makers = {
        "dense": lambda: networks.dense(networks.WIDTH),
        "batch_norm": networks.batch_norm,
        "dropout": networks.dropout,
        "repeat": lambda: fdg.repeat(networks.dense(networks.WIDTH), 2),
    }
    middle = [makers[kind]() for kind in draws.draw(st.lists(kinds, min_size=1, max_size=4))]
    head = networks.dense(networks.CLASSES, lambda x: x)
    layers = [networks.dense(networks.WIDTH), *middle, head]
    units = sum(layer.size for layer in layers)
    num_stages = draws.draw(st.integers(1, min(6, units)))
    numbers = st.lists(
        st.integers(1, units - 1), min_size=num_stages - 1, max_size=num_stages - 1, unique=True
    )
    cuts = sorted(draws.draw(numbers))
    order = draws.draw(st.sampled_from(["forward_first", "backward_first"]))
    beta = draws.draw(st.sampled_from([0.3, 1.0]))
    data = networks.batches(30)
    stages = fdg.partition(layers, num_stages, data[0][0], cost=cuts)
    schedule = fdg.schedule.fdg(num_stages, order)
    networks.assert_equals_oracle(stages, networks.sgd(beta, num_stages), schedule, data)


def test_accumulated_gradients_are_applied_as_their_mean_also_at_the_drain():
    # Two stages, an update after every third batch; 31 leaves one over for the drain.
    def rule(t):
        actions = []
        for k in (1, 0):
            n = t - 2 + k
            actions += [Action("F", t - k, k), Action("B", n, k)]
            actions += [Action("U", n, k)] if n % 3 == 2 else []
        return actions

    data = networks.batches(31)
    stages = fdg.partition(networks.network(), 2, data[0][0], cost=[4])
    schedule = Schedule("accumulating", 2, rule)
    _, state = networks.assert_equals_oracle(stages, networks.sgd(0.5, 2), schedule, data)
    assert [s.version for s in state.stages] == [11, 11]


def test_the_oracle_itself_on_a_network_solved_by_hand():
    # y = w1 w0 x, loss y²/2, x = 1: dw0 = w1² w0, dw1 = w1 w0². Stage 0 is two updates late.
    scale = fdg.Layer(lambda key, x: (jnp.ones(()), ()), lambda p, s, x, *, train, key: (p * x, s))
    data = [(np.ones((1, 1)), np.zeros((1, 1)))] * 4
    run = reference.train(
        [scale, scale],
        lambda y, t: (jnp.mean((y - t) ** 2) / 2, {}),
        lambda k: optax.sgd(0.1),
        fdg.schedule.fdg(2),
        [jnp.ones(()), jnp.ones(())],
        [(), ()],
        jax.random.key(0),
        data,
    )
    w0, w1, seen = 1.0, 1.0, []
    versions = [1.0]
    for n in range(4):
        # Batch n meets stage 0 as it was two updates (of stage 0) ago: batches 0..n-3 are in it.
        old = versions[max(0, n - 2)]
        seen.append((w1 * old) ** 2 / 2)
        g0, g1 = w1 * w1 * old, w1 * old * old
        w1 -= 0.1 * g1
        w0 -= 0.1 * g0
        versions.append(w0)
    np.testing.assert_allclose([float(loss) for loss in run.losses], seen, rtol=1e-14)
    np.testing.assert_allclose([float(p) for p in run.params], [w0, w1], rtol=1e-14)


SCHEDULES = {
    "backprop": fdg.schedule.backprop(3),
    "fdg": fdg.schedule.fdg(3),
    "fdg backward first": fdg.schedule.fdg(3, "backward_first"),
    "ddg": fdg.schedule.ddg(3),
    "pipedream": fdg.schedule.pipedream(3),
    "pipedream_2bw": fdg.schedule.pipedream_2bw(3),
    "pipedream_2bw 4": fdg.schedule.pipedream_2bw(3, accumulate=4),
    "gpipe": fdg.schedule.gpipe(3, microbatches=4),
    "one_f_one_b": fdg.schedule.one_f_one_b(3, microbatches=4),
    "zero_bubble": fdg.schedule.zero_bubble(3, microbatches=4),
    "then": fdg.schedule.then(fdg.schedule.backprop(3), 9, fdg.schedule.fdg(3)),
    "adl": fdg.schedule.adl(3, accumulate=2),
    "adl sum": fdg.schedule.adl(3, accumulate=3, reduction="sum"),
    "adl backward first": fdg.schedule.adl(3, accumulate=2, order="backward_first"),
}


@pytest.mark.parametrize(
    ("name", "gradient"), thinned(SCHEDULES, ["stale", "recompute_stale", "recompute"])
)
def test_every_schedule_with_every_gradient_equals_the_oracle(name, gradient):
    data = networks.batches(31)
    stages = fdg.partition(networks.network(), 3, data[0][0], cost=[2, 4])
    networks.assert_equals_oracle(
        stages, networks.sgd(0.5, 3), SCHEDULES[name], data, gradient=gradient
    )


def test_recomputing_at_todays_weights_is_another_gradient():
    data = networks.batches(31)
    stages = fdg.partition(networks.network(), 3, data[0][0], cost=[2, 4])
    final = {}
    for gradient in ("stale", "recompute_stale", "recompute"):
        pipe = fdg.Pipeline(
            stages, networks.loss_fn, networks.sgd(1, 3), fdg.schedule.fdg(3), gradient=gradient
        )
        final[gradient] = pipe.params(networks.run(pipe, data)[0])
    assert networks.difference(final["stale"], final["recompute_stale"]) <= 1e-12
    assert networks.difference(final["stale"], final["recompute"]) > 1e-6


@pytest.mark.parametrize(
    "schedule",
    thinned(
        [
            fdg.schedule.gpipe(2, microbatches=4),
            fdg.schedule.one_f_one_b(2, microbatches=2),
            fdg.schedule.one_f_one_b(1, microbatches=2),
            fdg.schedule.gpipe(5, microbatches=1),
            fdg.schedule.one_f_one_b(5, microbatches=2),
            fdg.schedule.pipedream_2bw(2),
            fdg.schedule.adl(4, accumulate=5),
            fdg.schedule.ddg(5),
        ],
        keep=3,
    ),
    ids=lambda schedule: f"{schedule.name}-{schedule.num_stages}",
)
def test_other_numbers_of_stages_and_parts(schedule):
    data = networks.batches(30)
    stages = fdg.partition(networks.network(), schedule.num_stages, data[0][0], cost=[1] * 7)
    networks.assert_equals_oracle(stages, networks.sgd(0.5, schedule.num_stages), schedule, data)


@pytest.mark.parametrize("make", [fdg.schedule.gpipe, fdg.schedule.one_f_one_b])
def test_micro_batches_without_batch_statistics_are_backprop(make):
    data = networks.batches(20)
    layers = [networks.dense(networks.WIDTH) for _ in range(3)]
    stages = [*layers, networks.dense(networks.CLASSES, lambda x: x)]

    def train(schedule):
        pipe = fdg.Pipeline(stages, networks.loss_fn, networks.sgd(1, 4), schedule)
        state, metrics = networks.run(pipe, data)
        return pipe.params(state), [m.loss for m in metrics]

    whole, parts = train(fdg.schedule.backprop(4)), train(make(4, microbatches=4))
    assert networks.difference(whole, parts) <= 1e-12


def test_adl_that_accumulates_one_is_fdg_bit_for_bit():
    data = networks.batches(20)
    stages = fdg.partition(networks.network(), 3, data[0][0], cost=[2, 4])
    final = []
    for schedule in (fdg.schedule.fdg(3), fdg.schedule.adl(3, accumulate=1)):
        pipe = fdg.Pipeline(stages, networks.loss_fn, networks.sgd(0.5, 3), schedule)
        state, metrics = networks.run(pipe, data)
        final.append((pipe.params(state), [m.loss for m in metrics]))
    assert networks.difference(*final) == 0
