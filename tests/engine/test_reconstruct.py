"""Backwards at weights reconstructed from an average of their changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import reference
from fdg_jax.checkpoint import Checkpointer, convert, manifest, weights
from fdg_jax.engine.reconstruct import Reconstruct
from fdg_jax.engine.rules import stage_rule
from tests import networks
from tests.thinned import thinned

DATA = networks.batches(24)
SCHEDULES = {
    "fdg": fdg.schedule.fdg,
    "backward first": lambda k: fdg.schedule.fdg(k, "backward_first"),
    "ddg": fdg.schedule.ddg,
    "adl": lambda k: fdg.schedule.adl(k, 2),
    "adl 3": lambda k: fdg.schedule.adl(k, 3),
    "2bw": fdg.schedule.pipedream_2bw,
    "gpipe": lambda k: fdg.schedule.gpipe(k, 2),
    "zero bubble": lambda k: fdg.schedule.zero_bubble(k, 2),
    "then": lambda k: fdg.schedule.then(fdg.schedule.backprop(k), 7, fdg.schedule.fdg(k)),
}


def partitioned(num_stages: int):
    return fdg.partition(networks.network(), num_stages, DATA[0][0], cost=[1] * 7)


def pipeline(num_stages: int, make=fdg.schedule.fdg, gradient="reconstruct", **options):
    optimizer = options.pop("optimizer", networks.sgd(0.5, num_stages))
    stages = options.pop("stages", partitioned(num_stages))
    return fdg.Pipeline(
        stages, networks.loss_fn, optimizer, make(num_stages), gradient=gradient, **options
    )


@pytest.mark.parametrize(("schedule", "num_stages"), thinned(SCHEDULES, [1, 2, 3, 4]))
def test_equals_the_oracle(schedule, num_stages):
    if schedule not in ("fdg", "ddg", "adl") and num_stages != 3:
        pytest.skip("every schedule once, the methods at every K")
    networks.assert_equals_oracle(
        partitioned(num_stages),
        networks.sgd(0.5, num_stages),
        SCHEDULES[schedule](num_stages),
        DATA,
        gradient="reconstruct",
    )


@pytest.mark.parametrize("decay", [0, 0.7])
def test_with_another_decay_it_equals_the_oracle_and_is_another_gradient(decay):
    found = networks.assert_equals_oracle(
        partitioned(3),
        networks.sgd(1, 3),
        fdg.schedule.fdg(3),
        DATA,
        gradient=Reconstruct(decay=decay),
    )[1]
    for rule in ("stale", "recompute", "reconstruct"):
        state, _ = networks.run(pipeline(3, optimizer=networks.sgd(1, 3), gradient=rule), DATA)
        params = [[s.params for s in own.stages] for own in (state, found)]
        assert networks.difference(*params) > 1e-5


@pytest.mark.parametrize("make", [fdg.schedule.fdg, lambda k: fdg.schedule.adl(k, 2)])
def test_corrections_of_single_gradients_equal_the_oracle(make):
    # They get the weights at which the gradient was taken, and of how many updates ago these are.
    optimizer = networks.sgd(0.5, 3)

    def two(k):
        return fdg.StageOptimizer(optimizer(k), per_gradient=fdg.delay_compensation(0.3))

    networks.assert_equals_oracle(partitioned(3), two, make(3), DATA, gradient="reconstruct")


def test_one_weight_by_hand():
    # y = w² x in stage 0, loss y²/2 in stage 1, x = 1: the cotangent is the y of the forward, the
    # derivative 2 w^ that of the backward. FDG: w^ = w - 2 delta in steady state.
    square = fdg.Layer(
        lambda key, x: (jnp.full((), 0.9), ()), lambda p, s, x, *, train, key: (p**2 * x, s)
    )
    data = [(np.ones((1, 1)), np.zeros((1, 1)))] * 8
    arguments = (
        [square, fdg.from_fn(lambda y: y)],
        lambda y, t: (jnp.mean((y - t) ** 2) / 2, {}),
        lambda k: optax.sgd(0.1),
        fdg.schedule.fdg(2),
    )
    versions, delta, gamma = [0.9], 0.0, 0.135 ** (1 / 2)
    for n in range(8):
        ago = min(n, 2)  # of the first batches, fewer updates come between
        then, now = versions[n - ago], versions[-1]
        estimate = now - ago * delta
        versions.append(now - 0.1 * then**2 * 2 * estimate)
        delta = gamma * delta + (1 - gamma) * (versions[-1] - now)
    pipe = fdg.Pipeline(*arguments, gradient="reconstruct")
    state, _ = networks.run(pipe, data)
    np.testing.assert_allclose(float(pipe.params(state)[0]), versions[-1], rtol=1e-14)
    np.testing.assert_allclose(float(state.stages[0].opt_state.average[0]), delta, rtol=1e-12)
    start = [jnp.full((), 0.9), ()]
    key = jax.random.key(0)
    run = reference.train(*arguments, start, [(), ()], key, data, gradient="reconstruct")
    np.testing.assert_allclose(float(run.params[0]), versions[-1], rtol=1e-14)


def noting(count: int) -> optax.GradientTransformation:
    """Notes the weights of each gradient, and those before each update."""

    def init(params):
        empty = jax.tree.map(lambda p: jnp.zeros((count, *p.shape), p.dtype), params)
        return jnp.int32(0), empty, empty, jnp.zeros(count)

    def update(updates, state, params=None, *, stale_params, staleness, **rest):
        i, then, now, late = state
        then, now = (
            jax.tree.map(lambda kept, p: kept.at[i].set(p), kept, new)
            for kept, new in ((then, stale_params), (now, params))
        )
        return updates, (i + 1, then, now, late.at[i].set(staleness))

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.parametrize("make", [fdg.schedule.fdg, fdg.schedule.ddg])
def test_on_a_line_the_estimate_tends_to_the_weights_of_the_forward(make):
    # y = w + x and a loss that is the mean of y: every gradient is 1, every change the same.
    shift = fdg.Layer(lambda key, x: (jnp.zeros(()), ()), lambda p, s, x, *, train, key: (p + x, s))
    data = [(np.ones((1, 1)), np.zeros((1, 1)))] * 60
    schedule = make(3)
    pipe = fdg.Pipeline(
        [shift] * 3,
        lambda y, t: (jnp.mean(y), {}),
        lambda k: optax.chain(noting(60), optax.sgd(0.1)),
        schedule,
        gradient="reconstruct",
    )
    state, _ = networks.run(pipe, data)
    for k, own in enumerate(state.stages[:2]):
        tau = schedule.staleness(k)
        _, estimate, now, late = own.opt_state.inner[0]
        estimate, now = estimate[k], now[k]
        ago = np.minimum(np.arange(60), tau)
        np.testing.assert_array_equal(late, ago)
        forward = now[np.arange(60) - ago]
        # What the average has not seen yet: 0.135 ** (n / tau) of the way after n updates.
        missing = 0.1 * ago * 0.135 ** (np.arange(60) / tau)
        np.testing.assert_allclose(forward - estimate, missing, rtol=0, atol=1e-12)
        assert missing[10 * tau] < 1e-7


def test_tau_is_counted_from_the_schedule():
    for make in (fdg.schedule.fdg, fdg.schedule.ddg, lambda k: fdg.schedule.adl(k, 3)):
        schedule = make(4)
        for k in range(4):
            rule = stage_rule("reconstruct", schedule, k)
            assert rule.staleness == schedule.staleness(k)
            assert rule.estimates_weights == (schedule.staleness(k) > 0)
            if rule.estimates_weights:
                assert rule.gamma ** schedule.staleness(k) == pytest.approx(0.135)


@pytest.mark.parametrize("name", ["backprop", "gpipe", "local", "zero_bubble"])
def test_where_nothing_is_stale_it_is_recompute_bit_for_bit(name):
    ends = []
    for gradient in ("recompute", "reconstruct"):
        loss = networks.loss_fn
        if name == "local":
            loss = [lambda y, t: networks.loss_fn(y[:, : networks.CLASSES], t), networks.loss_fn]
        pipe = fdg.Pipeline(
            partitioned(2),
            loss,
            networks.sgd(1, 2),
            fdg.schedule.create(name, 2),
            gradient=gradient,
        )
        ends.append(networks.run(pipe, DATA)[0])
    assert jax.tree.structure(ends[0]) == jax.tree.structure(ends[1])
    assert networks.difference(ends[0].stages[0].params, ends[1].stages[0].params) == 0


def test_the_newest_stage_keeps_no_average_and_flights_keep_the_input_alone():
    pipe = pipeline(3)
    state = pipe.init(jax.random.key(7), *DATA[0])
    for batch in DATA[:9]:
        state, _ = pipe.step(state, batch)
    plain = pipeline(3, gradient="recompute").template(DATA[0])
    for own, other in zip(state.stages, plain.stages, strict=True):
        assert not own.versions.values
        assert all(stash.residuals is None for _, stash in own.flights.items())
        assert jax.tree.structure(own.flights) == jax.tree.structure(other.flights)
    assert [isinstance(own.opt_state, fdg.optim.ChangesState) for own in state.stages] == [
        *(True, True, False)
    ]


def test_nothing_compiles_after_the_first_full_tick_and_past_weights_are_one_program():
    pipe = pipeline(3)
    state = pipe.init(jax.random.key(7), *DATA[0])
    compiled = []

    def listen(event, duration, **rest):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for step in range(40):
        state, _ = pipe.step(state, DATA[step % 24])
        if step == 8:
            before = len(compiled)
    assert 0 < before == len(compiled)
    assert [stage.past_params._cache_size() for stage in pipe.stages] == [1, 1, 0]


@pytest.mark.parametrize("shard_optimizer", [False, True])
def test_several_devices_a_stage_equal_the_oracle(shard_optimizer):
    networks.assert_equals_oracle(
        partitioned(2),
        networks.sgd(0.5, 2),
        fdg.schedule.fdg(2),
        DATA,
        gradient="reconstruct",
        devices=jax.devices()[:4],
        shard_optimizer=shard_optimizer,
    )


def test_what_is_not_finite_leaves_the_average_as_it_is():
    data = [(x.copy(), t) for x, t in DATA]
    data[5][0][:] = np.nan
    stages = [networks.dense(networks.WIDTH), networks.dense(networks.CLASSES, lambda x: x)]
    pipe = pipeline(2, stages=stages, optimizer=optax.sgd(0.1), on_nonfinite="skip")
    state, _ = networks.run(pipe, data)
    assert pipe.skipped(state) == [1, 1]
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(state.stages[0].opt_state))


def predicting(schedule):
    return lambda k: fdg.delayed_sgd(0.1, 0.9, (schedule, k))


def test_weights_are_read_from_a_checkpoint_where_the_optimizer_predicts(tmp_path):
    schedule, stages = fdg.schedule.fdg(3), partitioned(3)
    pipe = pipeline(3, stages=stages, optimizer=predicting(schedule))
    state = pipe.init(jax.random.key(7), *DATA[0])
    for batch in DATA[:9]:
        state, _ = pipe.step(state, batch)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, 9)
    folder, x = manifest.folder(tmp_path, 9), DATA[0][0]
    found = weights.read(folder, stages, x, lambda k: pipe.stages[k].optimizer)
    jax.tree.map(np.testing.assert_array_equal, found.params, pipe.true_params(state))
    found = weights.read(folder, stages, x)
    jax.tree.map(np.testing.assert_array_equal, found.params, pipe.params(state))


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 4), (3, 1), (1, 3)])
def test_another_number_of_stages_begins_the_average_anew(before, after):
    source, target = pipeline(before), pipeline(after)
    state = source.init(jax.random.key(7), *DATA[0])
    for batch in DATA[:9]:
        state, _ = source.step(state, batch)
    trained = source.drain(jax.tree.map(jnp.copy, state))[0]
    state = convert(source, state, target, *DATA[0])
    params = [
        [leaf for own in s.stages for leaf in jax.tree.leaves(own.params)] for s in (trained, state)
    ]
    assert sum(v.size for v in params[0]) == sum(v.size for v in params[1])
    for own in state.stages[:-1]:
        assert not any(np.any(v) for v in jax.tree.leaves(own.opt_state.average))
    momentum = [
        sum(
            float(jnp.sum(jnp.abs(leaf)))
            for own in s.stages
            for leaf in jax.tree.leaves(getattr(own.opt_state, "inner", own.opt_state))
        )
        for s in (trained, state)
    ]
    assert momentum[0] > 0
    for batch in DATA[9:12]:
        state, _ = target.step(state, batch)
    target.drain(state)


def test_decay_is_checked():
    with pytest.raises(ValueError, match="decay=1: must lie in"):
        Reconstruct(decay=1)


@dataclasses.dataclass(frozen=True)
class Newest(Reconstruct):
    """A rule of one's own that extends this one."""

    name: str = "newest"

    def past_params(self, params, opt_state, updates_ago):
        return params


def test_a_rule_of_ones_own_may_estimate_otherwise():
    ends = []
    for rule in ("recompute", Newest()):
        state, _ = networks.run(pipeline(3, gradient=rule), DATA)
        ends.append([own.params for own in state.stages])
    assert networks.difference(*ends) <= 1e-12
