"""Losses that are a sum and a weight: the mean over what counts, however a batch is divided."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.schedule import Schedule
from tests import networks
from tests.thinned import thinned

T = 5
RNG = np.random.default_rng(1)


def tokens(count: int, empty: bool = False):
    """Sequences [B, T, 4], with labels [B, T] and a mask that counts other numbers in each part."""
    data = []
    for _ in range(count):
        mask = RNG.random((networks.BATCH, T)) < np.linspace(0.1, 0.9, networks.BATCH)[:, None]
        mask[:4] &= not empty
        labels = RNG.integers(0, networks.CLASSES, (networks.BATCH, T))
        data.append((RNG.normal(size=(networks.BATCH, T, 4)), (labels, mask)))
    return data


def parts(outputs, labels):
    labels, mask = labels
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    wrong = outputs.argmax(-1) != labels
    return jnp.sum(jnp.where(mask, loss, 0)), mask.sum(), jnp.sum(wrong & mask)


def weighted(outputs, labels):
    total, weight, wrong = parts(outputs, labels)
    return (total, weight), {"error": wrong / jnp.maximum(weight, 1)}


def mean(outputs, labels):
    total, weight, wrong = parts(outputs, labels)
    return total / jnp.maximum(weight, 1), {"error": wrong / jnp.maximum(weight, 1)}


def network(num_stages):
    layers = [networks.dense(networks.WIDTH) for _ in range(3)]
    layers.append(networks.dense(networks.CLASSES, lambda x: x))
    return fdg.partition(layers, num_stages, np.ones((8, T, 4)), cost=[1] * 4)


def trained(schedule, loss, data, **options):
    num_stages = schedule.num_stages
    pipe = fdg.Pipeline(network(num_stages), loss, networks.sgd(1, num_stages), schedule, **options)
    return pipe, *networks.run(pipe, data)


MICROBATCHED = [
    fdg.schedule.gpipe(2, microbatches=4),
    fdg.schedule.one_f_one_b(3, microbatches=2),
    fdg.schedule.zero_bubble(2, microbatches=8),
    fdg.schedule.gpipe(1, microbatches=2),
]
each = pytest.mark.parametrize("schedule", MICROBATCHED, ids=lambda s: f"{s.name}-{s.microbatches}")


@each
@pytest.mark.parametrize("empty", thinned([False, True], keep=3))
def test_micro_batches_of_sums_and_weights_are_backprop(schedule, empty):
    data = tokens(6, empty)
    _, state, metrics = trained(schedule, weighted, data)
    plain = fdg.schedule.backprop(schedule.num_stages)
    for loss in (mean, weighted):
        pipe, expected, whole = trained(plain, loss, data)
        assert networks.difference(pipe.params(state), pipe.params(expected)) < 1e-12
        for a, b in zip(metrics, whole, strict=True):
            assert a.loss == pytest.approx(float(b.loss), abs=1e-12)
            assert a.aux["error"] == pytest.approx(float(b.aux["error"]), abs=1e-12)
    # The mean of means is another loss.
    pipe, other, _ = trained(schedule, mean, data)
    assert networks.difference(pipe.params(state), pipe.params(other)) > 1e-3


@each
@pytest.mark.parametrize("gradient", ["stale", "recompute"])
def test_it_equals_the_oracle(schedule, gradient):
    stages = network(schedule.num_stages)
    optimizer = networks.sgd(1, schedule.num_stages)
    networks.assert_equals_oracle(
        stages, optimizer, schedule, tokens(5), loss=weighted, gradient=gradient
    )


def test_it_equals_the_oracle_of_reversible_layers():
    branch = networks.dense(3)
    layers = [
        networks.dense(6),
        fdg.two_streams(),
        fdg.coupling(branch),
        fdg.coupling(branch),
        networks.merge(),
        networks.dense(networks.CLASSES, lambda x: x),
    ]
    data = tokens(5)
    stages = fdg.partition(layers, 2, data[0][0], cost=[3])
    rule = fdg.schedule.gpipe(2, microbatches=2)
    networks.assert_equals_oracle(
        stages, networks.sgd(1, 2), rule, data, loss=weighted, gradient="reversible"
    )


@pytest.mark.parametrize(
    "schedule", [fdg.schedule.fdg(2), fdg.schedule.adl(2, accumulate=2)], ids=lambda s: s.name
)
def test_where_batches_are_not_divided_it_is_the_mean(schedule):
    data = tokens(6)
    networks.assert_equals_oracle(network(2), networks.sgd(1, 2), schedule, data, loss=weighted)
    pipe, state, _ = trained(schedule, weighted, data)
    _, expected, _ = trained(schedule, mean, data)
    assert networks.difference(pipe.params(state), pipe.params(expected)) < 1e-13


def test_several_losses_and_predicted_cotangents_take_weights():
    data = tokens(4)
    rule = fdg.schedule.local(2)
    head = networks.dense(networks.CLASSES, lambda x: x)
    first, last = network(2)
    stages = [fdg.with_head(first, head), last]
    networks.assert_equals_oracle(stages, networks.sgd(1, 2), rule, data, loss=[weighted, weighted])


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_of_a_stage_change_nothing(devices):
    data, schedule = tokens(4), fdg.schedule.gpipe(2, microbatches=2)
    pipe, state, _ = trained(schedule, weighted, data, devices=jax.devices()[:devices])
    _, expected, _ = trained(fdg.schedule.backprop(2), mean, data)
    assert networks.difference(pipe.params(state), pipe.params(expected)) < 1e-12


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b", "zero_bubble"])
def test_a_part_that_is_left_out_has_no_weight(name):
    """It is as if its tokens had been masked."""
    schedule = fdg.schedule.create(name, 2, microbatches=4)
    data = tokens(3)
    x, (labels, mask) = data[1]
    bad, masked = x.copy(), mask.copy()
    bad[2:4], masked[2:4] = np.nan, False
    broken = [data[0], (bad, (labels, mask)), data[2]]
    pipe, state, _ = trained(schedule, weighted, broken, on_nonfinite="skip")
    assert pipe.skipped(state) == [1, 1]
    _, expected, _ = trained(schedule, weighted, [data[0], (x, (labels, masked)), data[2]])
    assert networks.difference(pipe.params(state), pipe.params(expected)) < 1e-12


def test_a_weight_has_no_gradient():
    """Even where it is computed from the outputs."""

    def confident(outputs, labels):
        weight = jax.nn.softmax(outputs).max(-1).sum()
        return (outputs.sum(), weight), {}

    pipe = fdg.Pipeline(
        [networks.dense(3)], confident, lambda k: optax.sgd(1.0), fdg.schedule.backprop(1)
    )
    x = np.ones((4, 4))
    state = pipe.init(jax.random.key(0), x)
    before = jax.device_get(pipe.params(state)[0])
    state, _ = pipe.step(state, (x, x))

    def plain(p):
        y = jnp.tanh(x @ p["kernel"] + p["bias"])
        return y.sum() / jax.lax.stop_gradient(jax.nn.softmax(y).max(-1).sum())

    expected = jax.tree.map(lambda p, g: p - g, before, jax.grad(plain)(before))
    assert networks.difference(pipe.params(state)[0], expected) < 1e-12


@dataclasses.dataclass(frozen=True)
class Divided:
    """FDG whose mini-batches are divided in two."""

    rule: Schedule

    def __call__(self, t):
        actions = []
        for action in self.rule.tick(t):
            if action.kind == "U":
                actions.append(action)
            else:
                actions += [action._replace(micro=m) for m in range(2)]
        return actions


def test_what_is_refused():
    x, labels = tokens(1)[0]

    def step(loss, schedule, optimizer=lambda k: optax.sgd(0.1)):
        pipe = fdg.Pipeline(network(schedule.num_stages), loss, optimizer, schedule)
        pipe.step(pipe.init(jax.random.key(0), x), (x, labels))

    divided = Schedule("divided", 2, Divided(fdg.schedule.fdg(2)), microbatches=2)
    step(mean, divided)
    with pytest.raises(ValueError, match=r"\(sum, weight\), but schedule divided keeps"):
        step(weighted, divided)
    two = fdg.StageOptimizer(optax.sgd(0.1), per_gradient=optax.clip(1.0))
    with pytest.raises(ValueError, match="optimizer of stage 0 corrects each gradient"):
        step(weighted, fdg.schedule.gpipe(2, 2), two)
    for rule in (fdg.schedule.backprop(2), fdg.schedule.gpipe(2, 2)):
        for wrong in (
            lambda y, t: ((y.sum(-1), 1.0), {}),
            lambda y, t: ((y.sum(), y.sum(-1)), {}),
            lambda y, t: ((y.sum(), 1.0), 3),
            lambda y, t: ((y.sum(), 1.0, 2.0), {}),
        ):
            with pytest.raises(ValueError, match=r"loss_fn: returns .* or \(sum, weight\)"):
                step(wrong, rule)


def test_metrics_by_name_are_those_of_the_last_batch():
    data = tokens(4)
    pipe = fdg.Pipeline(network(2), weighted, networks.sgd(1, 2), fdg.schedule.fdg(2))
    state, found = pipe.init(jax.random.key(0), *data[0]), []
    for batch in data:
        state, metrics = pipe.step(state, batch)
        found.append(metrics)
    assert found[0] == []
    assert np.isnan(found[0]["loss"])
    assert [m["batch"] for m in found[1:]] == [0, 1, 2]
    assert found[1]["loss"] is found[1][0].loss is found[1][0]["loss"]
    assert found[1]["error"] is found[1][0].aux["error"] is found[1][0][2]["error"]
    with pytest.raises(KeyError, match="accuracy"):
        found[1]["accuracy"]
