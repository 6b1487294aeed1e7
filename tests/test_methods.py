"""Methods by name: what each is made of."""

import collections

import jax
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import methods
from tests import networks

DATA = networks.batches(16)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_a_schedule_and_a_rule(name):
    made = methods.create(name, 3)
    method = methods.METHODS[name]
    assert made["schedule"].name == method.schedule
    assert made["schedule"].num_stages == (1 if method.one_stage else 3)
    assert made["gradient"] == (method.gradient or "stale")


def drift(schedule: fdg.schedule.Schedule, batches: int) -> list[int]:
    """The most updates between a forward and its backward, of each stage, counted from actions."""
    updates, seen = collections.Counter(), {}
    most = [0] * schedule.num_stages
    for action in (a for tick in schedule.stream(batches) for a in tick):
        k = action.stage
        if action.kind == "F":
            seen[k, action.batch] = updates[k]
        elif action.kind == "B":
            most[k] = max(most[k], updates[k] - seen[k, action.batch])
        else:
            updates[k] += 1
    return most


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6])
def test_paci_is_adl_at_the_newest_weights_and_these_drift_so_far(num_stages, accumulate):
    made = methods.paci(num_stages, accumulate)
    assert made["schedule"] == fdg.schedule.adl(num_stages, accumulate)
    assert made["gradient"] == "recompute"
    found = drift(made["schedule"], 8 * num_stages * accumulate)
    for k, most in enumerate(found):
        assert most <= -(-2 * (num_stages - 1 - k) // accumulate)
        assert most == made["schedule"].staleness(k)


def test_pipemare_is_ddg_at_reconstructed_weights_and_takes_its_rate_in_the_optimizer():
    made = methods.pipemare(3)
    assert made["schedule"] == fdg.schedule.ddg(3)
    assert made["gradient"] == "reconstruct"
    # The same order of actions as 1F1B without a flush.
    one, two = (list(s.stream(9)) for s in (made["schedule"], fdg.schedule.pipedream(3)))
    assert one == two

    def optimizer(k: int):
        rate = fdg.staleness_rate(0.1, (made["schedule"], k), anneal_steps=10)
        return optax.sgd(rate, momentum=0.9)

    stages = fdg.partition(networks.network(), 3, DATA[0][0], cost=[1] * 7)
    networks.assert_equals_oracle(stages, optimizer, data=DATA, **made)
    pipe = fdg.Pipeline(stages, networks.loss_fn, optimizer, **made)
    first = pipe.init(jax.random.key(7), *DATA[0])
    assert [len(own.versions.values) for own in first.stages] == [0, 0, 0]
