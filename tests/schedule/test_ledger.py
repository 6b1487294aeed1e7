"""What a pipeline holds follows from its schedule."""

import jax
import pytest

import fdg_jax as fdg
from fdg_jax.checkpoint import snapshot
from fdg_jax.schedule import ledger
from tests import networks
from tests.checkpoint.test_checkpointer import SCHEDULES, make
from tests.thinned import thinned


@pytest.mark.parametrize("gradient", thinned(["recompute_stale", "recompute"], keep=3))
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_the_engine_holds_is_foretold(name, gradient):
    schedule = SCHEDULES[name](3)
    pipe = make(schedule, gradient=gradient)
    data = networks.batches(26)
    state = pipe.init(jax.random.key(7), *data[0])
    bases = [0, 0, 0]
    for i, batch in enumerate(data):
        if i == 3:  # fills anew
            state, _ = pipe.drain(state)
            bases = [int(s.version) for s in state.stages]
        state, _ = pipe.step(state, batch)
        there = schedule.holdings(int(state.tick - state.origin))
        for stage, own, base in zip(state.stages, there, bases, strict=True):
            origin = 3 if i >= 3 else 0
            expected = snapshot.foretold(own, schedule, pipe.rule, origin, base)
            assert snapshot.numbers(stage) == expected
            assert sorted(snapshot.sections(stage)) == sorted(snapshot.names(expected))


def seen(holdings):
    return [
        (
            own.version,
            own.pending,
            own.flights,
            {p: there for p, there in own.inbox.items() if there},
        )
        for own in holdings
    ]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_steady_state_is_not_gone_through(name, num_stages):
    schedule = SCHEDULES[name](num_stages)
    batches = 40 * schedule.period + 7
    whole = ledger.Ledger(schedule)
    for t in range(batches):  # all of it
        whole.enter(t)
        whole.run(schedule.tick(t))
    assert seen(schedule.holdings(batches)) == seen(whole.stages)


def test_a_run_of_years_costs_no_more():
    (stage,) = fdg.schedule.backprop(1).holdings(10**12)
    assert stage.version == 10**12


def test_a_sequence_holds_what_its_second_schedule_does():
    schedule = fdg.schedule.then(fdg.schedule.ddg(3), 5, fdg.schedule.fdg(3))
    whole = ledger.Ledger(schedule)
    for t in range(20):
        assert seen(schedule.holdings(t)) == seen(whole.stages)
        whole.enter(t)
        whole.run(schedule.tick(t))
