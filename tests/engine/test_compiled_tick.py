"""Ticks as one program: equal to dispatched ones in results, checkpoints and checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.analysis import Recorder
from fdg_jax.checkpoint import Checkpointer
from fdg_jax.engine import steady
from tests import networks
from tests.thinned import thinned

STEPS = 40
SCHEDULES = {
    "fdg": fdg.schedule.fdg(3),
    "backward_first": fdg.schedule.fdg(3, order="backward_first"),
    "adl": fdg.schedule.adl(3, 2),
    "adl_12": fdg.schedule.adl(3, 12),
    "ddg": fdg.schedule.ddg(3),
    "backprop": fdg.schedule.backprop(3),
    "gpipe": fdg.schedule.gpipe(3, 2),
    "one_f_one_b": fdg.schedule.one_f_one_b(3, 2),
    "zero_bubble": fdg.schedule.zero_bubble(3, 4),
    "pipedream_2bw": fdg.schedule.pipedream_2bw(3, 4),
    "then_fdg": fdg.schedule.then(fdg.schedule.backprop(3), 9, fdg.schedule.fdg(3)),
    "then_backprop": fdg.schedule.then(fdg.schedule.fdg(3), 9, fdg.schedule.backprop(3)),
    "period_not_named": dataclasses.replace(fdg.schedule.adl(3, 2), period=1),
}
RULES = ("stale", "recompute_stale", "recompute", "reconstruct")


def batches(steps=STEPS):
    return [(np.float64(x), y) for x, y in networks.batches(steps)]


def pipeline(schedule, compile, devices=1, remedy=False, **options):
    def optimizer(k):
        inner = optax.sgd(0.05, momentum=0.9)
        return fdg.predict_weights(inner, (schedule, k)) if remedy else inner

    stages = fdg.partition(networks.network(), schedule.num_stages, networks.batches(1)[0][0])
    given = jax.devices()[:devices]
    return fdg.Pipeline(
        stages, networks.loss_fn, optimizer, schedule, given, compile=compile, **options
    )


def train(pipe, data, state=None):
    """State, weights, and batch and loss of every report."""
    state = pipe.init(jax.random.key(0), *data[0]) if state is None else state
    found = []
    for batch in data:
        state, metrics = pipe.step(state, batch)
        found += metrics
    return state, [(m.batch, float(m.loss), float(m["error"])) for m in found]


def equal(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", thinned(SCHEDULES, keep=3))
def test_schedules(name):
    with jax.enable_x64(True):
        data = batches(2 * STEPS if name == "adl_12" else STEPS)
        one, two = (pipeline(SCHEDULES[name], compile) for compile in (False, True))
        (plain, losses), (compiled, again) = train(one, data), train(two, data)
        assert any(two._steady._known.values())
        assert [batch for batch, *_ in losses] == [batch for batch, *_ in again]
        np.testing.assert_allclose(losses, again, rtol=0, atol=1e-12)
        equal(plain, compiled)
        equal(one.drain(plain)[0], two.drain(compiled)[0])


@pytest.mark.parametrize(("rule", "guard"), thinned(RULES, ["ignore", "skip"], keep=3))
def test_rules_and_guard(rule, guard):
    with jax.enable_x64(True):
        data = batches()
        data[30] = np.full_like(data[30][0], np.nan if guard == "skip" else 1.0), data[30][1]
        options = {"gradient": rule, "on_nonfinite": guard, "remedy": rule == "stale"}
        pipes = [pipeline(SCHEDULES["fdg"], compile, **options) for compile in (False, True)]
        (plain, losses), (compiled, again) = (train(pipe, data) for pipe in pipes)
        np.testing.assert_allclose(losses, again, rtol=0, atol=1e-12)
        equal(plain, compiled)
        assert pipes[0].skipped(plain) == pipes[1].skipped(compiled)
        assert any(pipes[1].skipped(compiled)) == (guard == "skip")


def test_stop_names_the_stage():
    pipe = pipeline(SCHEDULES["fdg"], True, on_nonfinite="stop")
    data = networks.batches(STEPS)
    data[30] = np.full_like(data[30][0], np.nan), data[30][1]
    with pytest.raises(fdg.NonFiniteError, match=r"mini-batch 30: .* of stage 0"):
        train(pipe, data)


def test_group_of_devices():
    with jax.enable_x64(True):
        data = batches()
        schedule = fdg.schedule.fdg(1)
        one, two = (pipeline(schedule, compile, devices=2) for compile in (False, True))
        equal(train(one, data)[0], train(two, data)[0])


def test_one_structure_and_no_more_compilation():
    pipe = pipeline(SCHEDULES["adl"], True)
    data = networks.batches(STEPS)
    first = pipe.init(jax.random.key(0), *data[0])
    expected = jax.tree.structure(first), [v.shape for v in jax.tree.leaves(first)]
    state, _ = train(pipe, data, first)
    assert (jax.tree.structure(state), [v.shape for v in jax.tree.leaves(state)]) == expected
    programs = [one._tick.program for known in pipe._steady._known.values() for one in known]
    assert len(programs) == pipe.schedule.period
    state, _ = train(pipe, data, state)
    assert [program._cache_size() for program in programs] == [1] * len(programs)
    state, _ = pipe.drain(state)
    assert (jax.tree.structure(state), [v.shape for v in jax.tree.leaves(state)]) == expected


def test_a_long_accumulation_takes_few_programs():
    """Not one for each number of gradients that wait."""
    pipe = pipeline(SCHEDULES["adl_12"], True)
    train(pipe, networks.batches(80))
    programs = [one for known in pipe._steady._known.values() for one in known]
    assert 1 < len(programs) <= 10


def test_checkpoint_of_either_form(tmp_path):
    with jax.enable_x64(True):
        data = batches()
        one, two = (pipeline(SCHEDULES["fdg"], compile) for compile in (False, True))
        whole, _ = train(one, data)
        for a, b in ((one, two), (two, one)):
            state, _ = train(a, data[:30])
            with Checkpointer(tmp_path / str(a.compiled), a) as checkpoints:
                checkpoints.save(state, 30)
            with Checkpointer(tmp_path / str(a.compiled), b) as checkpoints:
                state, _ = checkpoints.restore(data[0])
            equal(train(b, data[30:], state)[0], whole)


@pytest.mark.parametrize(
    "name", thinned(["adl", "then_fdg", "pipedream_2bw", "period_not_named"], keep=3)
)
def test_a_restored_run_compiles_the_ticks_of_an_undisturbed_one(name, monkeypatch):
    """Compiled ticks may round differently, so these decide over the bits."""
    ticks = []
    step = steady.SteadyTicks.step

    def watched(self, state, x, labels):
        tick, made = int(state.tick), step(self, state, x, labels)
        ticks.append((tick, made is not None))
        return made

    monkeypatch.setattr(steady.SteadyTicks, "step", watched)
    data = batches(30)
    train(pipeline(SCHEDULES[name], True), data)
    whole = ticks.copy()
    assert {compiled for _, compiled in whole} == {False, True}
    for stop in (20, 23):
        state, _ = train(pipeline(SCHEDULES[name], True), data[:stop])
        ticks.clear()
        train(pipeline(SCHEDULES[name], True), data[stop:], state)
        assert ticks == whole[stop:]


def test_a_copied_state_goes_on_and_its_counters_are_on_the_host_again():
    data = batches(40)
    pipe = pipeline(SCHEDULES["adl"], True)
    state, _ = train(pipe, data[:30])
    copied = jax.tree.map(jnp.copy, state)
    one, two = (train(pipe, data[30:], own)[0] for own in (state, copied))
    equal(one, two)
    assert isinstance(two.stages[0].version, np.ndarray)
    assert isinstance(two.stages[0].flights.numbers, np.ndarray)


def test_a_consumed_state_is_named():
    pipe = pipeline(SCHEDULES["fdg"], True)
    data = networks.batches(STEPS)
    state, _ = train(pipe, data)
    pipe.step(state, data[0])
    with pytest.raises(fdg.ConsumedStateError):
        pipe.step(state, data[0])


def test_a_mini_batch_of_the_caller_stays_his():
    pipe = pipeline(SCHEDULES["fdg"], True)
    data = [(jnp.asarray(x), jnp.asarray(y)) for x, y in networks.batches(STEPS)]
    train(pipe, data)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(data))


def test_nothing_is_transferred_unasked():
    pipe = pipeline(SCHEDULES["fdg"], True)
    data = networks.batches(STEPS)
    state = pipe.init(jax.random.key(0), *data[0])
    with jax.transfer_guard("disallow"):
        for batch in data:
            state, _ = pipe.step(state, batch)
    assert any(pipe._steady._known.values())


def test_watched_programs_are_dispatched():
    pipe = pipeline(SCHEDULES["fdg"], True)
    data = networks.batches(STEPS)
    state, _ = train(pipe, data)
    recorder = Recorder(pipe, 4)
    train(pipe, data[:4], state)
    assert {event.action.stage for event in recorder.timeline().events} == {0, 1, 2}


def test_who_compiles():
    assert pipeline(SCHEDULES["fdg"], "auto").compiled
    assert not pipeline(SCHEDULES["fdg"], "auto", devices=3).compiled
    assert not pipeline(fdg.schedule.backprop(1), "auto").compiled
    assert not pipeline(SCHEDULES["fdg"], False).compiled


def test_different_devices_are_refused():
    with pytest.raises(ValueError, match="compile=True: stages on different devices"):
        pipeline(SCHEDULES["fdg"], True, devices=3)
    with pytest.raises(ValueError, match="compile='yes'"):
        pipeline(SCHEDULES["fdg"], "yes")
