"""Gradient rules, corrections of single gradients, local losses, split backwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import reference
from tests import networks
from tests.thinned import thinned

DATA = networks.batches(24)


@dataclasses.dataclass(frozen=True)
class Echo(fdg.GradientRule):
    """A rule whose messages are pairs: the stage's input, doubled, beside the cotangent."""

    name: str = "echo"

    def message(self, inputs, cotangent):
        return {"inputs": 2 * inputs, "cotangent": cotangent}

    def cotangent(self, message):
        return message["cotangent"]


def partitioned(num_stages: int):
    return fdg.partition(networks.network(), num_stages, DATA[0][0], cost=[1] * 7)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_messages_may_be_pytrees(num_stages):
    networks.assert_equals_oracle(
        partitioned(num_stages),
        networks.sgd(0.5, num_stages),
        fdg.schedule.fdg(num_stages),
        DATA,
        gradient=Echo(),
    )
    pipe = fdg.Pipeline(
        partitioned(num_stages),
        networks.loss_fn,
        networks.sgd(0.5, num_stages),
        fdg.schedule.fdg(num_stages),
        gradient=Echo(),
    )
    state = pipe.init(jax.random.key(0), *DATA[0])
    for batch in DATA[:8]:
        state, _ = pipe.step(state, batch)
    ((_, message),) = state.stages[0].inbox["cotangent"].items()
    assert set(message) == {"inputs", "cotangent"}


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="gradient='fresh': allowed are stale, recompute_stale"):
        fdg.Pipeline(
            partitioned(2), networks.loss_fn, optax.sgd(1), fdg.schedule.fdg(2), gradient="fresh"
        )


CORRECTIONS = {
    "delay compensation": lambda: fdg.delay_compensation(0.3),
    "adaptive": lambda: fdg.delay_compensation(0.3, adaptive=True),
    "gap aware": lambda: fdg.gap_aware(0.05),
}


@pytest.mark.parametrize(
    ("rule", "correction"),
    thinned(["stale", "recompute_stale", "recompute"], CORRECTIONS, keep=3),
)
def test_corrections_equal_the_oracle(correction, rule):
    # They need the weights of a gradient's own forward, and the oracle has every version.
    optimizer = networks.sgd(0.5, 3)
    networks.assert_equals_oracle(
        partitioned(3),
        lambda k: optax.chain(CORRECTIONS[correction](), optimizer(k)),
        fdg.schedule.fdg(3),
        DATA,
        gradient=rule,
    )


@pytest.mark.parametrize(
    ("correction", "schedule"),
    thinned(CORRECTIONS, [fdg.schedule.adl(3, 2), fdg.schedule.gpipe(3, 2)], keep=3),
)
def test_with_accumulation_corrections_are_due_for_each_gradient(correction, schedule):
    optimizer = networks.sgd(0.5, 3)

    def two(k):
        return fdg.StageOptimizer(optimizer(k), per_gradient=CORRECTIONS[correction]())

    networks.assert_equals_oracle(partitioned(3), two, schedule, DATA)


def test_a_correction_in_the_wrong_place_is_named():
    pipe = fdg.Pipeline(
        partitioned(2),
        networks.loss_fn,
        lambda k: optax.chain(fdg.delay_compensation(0.3), optax.sgd(0.1)),
        fdg.schedule.adl(2, 2),
    )
    state = pipe.init(jax.random.key(0), *DATA[0])
    with pytest.raises(ValueError, match=r"StageOptimizer\(per_gradient=...\)"):
        pipe.step(state, DATA[0])


def test_the_optimizer_is_told_the_staleness():
    def init(params):
        return jnp.full(60, -1.0), jnp.int32(0)

    def update(updates, state, params=None, *, staleness, **rest):
        seen, count = state
        return updates, (seen.at[count].set(staleness), count + 1)

    note = optax.GradientTransformationExtraArgs(init, update)
    pipe = fdg.Pipeline(
        partitioned(3),
        networks.loss_fn,
        lambda k: optax.chain(note, optax.sgd(0.01)),
        fdg.schedule.fdg(3),
    )
    state = pipe.init(jax.random.key(0), *DATA[0])
    for batch in DATA:
        state, _ = pipe.step(state, batch)
    for k, late in enumerate((4, 2, 0)):
        seen, count = state.stages[k].opt_state[0]
        expected = np.minimum(np.arange(int(count)), late)
        np.testing.assert_array_equal(seen[: int(count)], expected)


def local_loss(outputs, labels):
    return networks.loss_fn(outputs[:, : networks.CLASSES], labels)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_local_losses_equal_separate_loops(num_stages):
    losses = [local_loss] * (num_stages - 1) + [networks.loss_fn]
    pipe, _ = networks.assert_equals_oracle(
        partitioned(num_stages),
        networks.sgd(1, num_stages),
        fdg.schedule.local(num_stages),
        DATA,
        loss=losses if num_stages > 1 else networks.loss_fn,
    )
    state = pipe.init(jax.random.key(0), *DATA[0])
    for batch in DATA[:6]:
        state, metrics = pipe.step(state, batch)
    # Every stage's own loss is reported, each of the batch that it has.
    assert sorted((m.stage, m.batch) for m in metrics) == [(k, 5 - k) for k in range(num_stages)]
    assert "cotangent" not in state.stages[0].inbox


def test_losses_must_be_where_the_schedule_has_them():
    with pytest.raises(ValueError, match="give a list of 2"):
        fdg.Pipeline(partitioned(2), networks.loss_fn, networks.sgd(1, 2), fdg.schedule.local(2))
    with pytest.raises(ValueError, match=r"needs 2, with losses in \(1,\) and None elsewhere"):
        fdg.Pipeline(
            partitioned(2),
            [local_loss, networks.loss_fn],
            networks.sgd(1, 2),
            fdg.schedule.fdg(2),
        )


@pytest.mark.parametrize(("num_stages", "rule"), thinned([1, 2, 4], ["stale", "recompute"], keep=3))
def test_a_split_backward_is_gpipe_to_rounding(num_stages, rule):
    layers = networks.network(dropping=False)
    stages = fdg.partition(layers, num_stages, DATA[0][0], cost=[1] * 6)
    networks.assert_equals_oracle(
        stages,
        networks.sgd(0.5, num_stages),
        fdg.schedule.zero_bubble(num_stages, 4),
        DATA,
        gradient=rule,
    )
    ends = []
    for make in (fdg.schedule.gpipe, fdg.schedule.zero_bubble):
        pipe = fdg.Pipeline(
            stages, networks.loss_fn, networks.sgd(1, num_stages), make(num_stages, 4)
        )
        ends.append(pipe.params(networks.run(pipe, DATA)[0]))
    assert networks.difference(*ends) <= 1e-12


@pytest.mark.parametrize("second", [fdg.schedule.fdg(3), fdg.schedule.adl(3, 2)])
@pytest.mark.parametrize("first", [fdg.schedule.backprop(3), fdg.schedule.ddg(3)])
def test_one_schedule_after_another_equals_the_oracle(first, second):
    if second.name == "adl":
        first = fdg.schedule.adl(3, 3)
    networks.assert_equals_oracle(
        partitioned(3),
        networks.sgd(0.5, 3),
        fdg.schedule.then(first, 7, second),
        DATA,
    )


def test_the_oracle_of_local_losses_on_a_network_solved_by_hand():
    # y0 = w0 x, y1 = w1 y0; each stage's loss is its output squared, halved; x = 1.
    scale = fdg.Layer(lambda key, x: (jnp.ones(()), ()), lambda p, s, x, *, train, key: (p * x, s))
    loss = lambda y, t: (jnp.mean(y**2) / 2, {})  # noqa: E731
    run = reference.train(
        [scale, scale],
        [loss, loss],
        lambda k: optax.sgd(0.1),
        fdg.schedule.local(2),
        [jnp.ones(()), jnp.ones(())],
        [(), ()],
        jax.random.key(0),
        [(np.ones((1, 1)), np.zeros((1, 1)))] * 2,
    )
    w0, w1 = 1.0, 1.0
    for _ in range(2):
        y0 = w0
        w0, w1 = w0 - 0.1 * w0, w1 - 0.1 * w1 * y0**2
    np.testing.assert_allclose([float(p) for p in run.params], [w0, w1], rtol=1e-14)
