"""What a pipeline holds follows from its schedule."""

import jax
import pytest

import fdg_jax as fdg
from fdg_jax.checkpoint import snapshot
from fdg_jax.engine import ledger
from tests import networks
from tests.checkpoint.test_checkpointer import SCHEDULES, make


@pytest.mark.parametrize("gradient", ["recompute_stale", "recompute"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_the_engine_holds_is_foretold(name, gradient):
    schedule = SCHEDULES[name](3)
    pipe = make(schedule, gradient=gradient)
    data = networks.batches(26)
    state = pipe.init(jax.random.key(7), data[0][0])
    bases = [0, 0, 0]
    for i, batch in enumerate(data):
        if i == 3:  # fills anew
            state, _ = pipe.drain(state)
            bases = [int(s.version) for s in state.stages]
        state, _ = pipe.step(state, batch)
        there = ledger.inventory(schedule, state.tick - state.origin)
        for stage, own, base in zip(state.stages, there, bases, strict=True):
            found = snapshot.numbers(stage), set(snapshot.sections(stage))
            foretold = ledger.numbers(
                own, schedule, 3 if i >= 3 else 0, base, gradient == "recompute"
            )
            assert found == foretold


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_steady_state_is_not_gone_through(name, num_stages, monkeypatch):
    schedule = SCHEDULES[name](num_stages)
    late = 40 * schedule.period
    shifted = ledger.inventory(schedule, late + 7)
    monkeypatch.setattr(type(schedule), "in_flight", lambda self, k: late)  # goes through all
    assert ledger.inventory(schedule, late + 7) == shifted


def test_a_run_of_years_costs_no_more():
    (stage,) = ledger.inventory(fdg.schedule.backprop(1), 10**12)
    assert stage.version == 10**12
