"""Bytes of messages: counted from shapes, found in a state, and in the simulator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdg_jax as fdg
from fdg_jax.analysis import Costs, message_bytes
from fdg_jax.analysis.simulate import simulate
from tests import networks

DATA = [(x.astype(np.float32), labels) for x, labels in networks.batches(8)]
# Of a message: batch 8, width 6.
NUMBERS, CHANNELS = networks.BATCH * networks.WIDTH, networks.WIDTH
SIZES = {None: 4 * NUMBERS, "bfloat16": 2 * NUMBERS, "int8": NUMBERS + 4 * CHANNELS}


def pipeline(schedule, dtype=None) -> fdg.Pipeline:
    k = schedule.num_stages
    single = fdg.from_fn(lambda x: x.astype(jnp.float32))
    stages = [fdg.chain([networks.dense(networks.WIDTH), single])] * k
    loss = [networks.loss_fn] * k if len(schedule.losses) > 1 else networks.loss_fn
    return fdg.Pipeline(stages, loss, networks.sgd(1, k), schedule, message_dtype=dtype)


@pytest.mark.parametrize("dtype", SIZES)
def test_fewer_bits_are_fewer_bytes_in_the_state_and_in_the_simulator(dtype):
    schedule = fdg.schedule.fdg(3)
    pipe = pipeline(schedule, dtype)
    size = SIZES[dtype]
    found = message_bytes(pipe, DATA[0])
    assert found.inputs == (DATA[0][0].nbytes, size, size)
    assert found.cotangents == (0, size, size)
    # What is on its way between two ticks.
    state = pipe.init(jax.random.key(0), *DATA[0])
    for batch in DATA:
        state, _ = pipe.step(state, batch)
    for k in (1, 2):
        for own, port in ((state.stages[k], "activation"), (state.stages[k - 1], "cotangent")):
            ((_, message),) = own.inbox[port].items()
            assert sum(leaf.nbytes for leaf in jax.tree.leaves(message)) == size
    costs = Costs([1] * 3, [2] * 3, input_bytes=found.inputs, cotangent_bytes=found.cotangents)
    run = simulate(schedule, costs)
    assert [run.sent_bytes(k) for k in (0, 1)] == [2 * size] * 2


def test_micro_batches_have_scales_of_their_own():
    for schedule, parts in ((fdg.schedule.gpipe(2, 2), 2), (fdg.schedule.zero_bubble(2, 4), 4)):
        found = message_bytes(pipeline(schedule, jnp.int8), DATA[0])
        assert found.inputs[1] == NUMBERS + parts * 4 * CHANNELS


def test_losses_of_ones_own_send_nothing_back():
    schedule = fdg.schedule.local(2)
    found = message_bytes(pipeline(schedule), DATA[0])
    assert found.cotangents == (0, 0)
    costs = Costs([1] * 2, [2] * 2, input_bytes=found.inputs)
    assert simulate(schedule, costs).sent_bytes(0) == SIZES[None]


def test_of_what_an_action_may_give_only_what_it_does_is_counted():
    # A true cotangent passes through a stage in one of two ways, D or B.
    costs = Costs([1] * 3, [2] * 3, input_bytes=[7, 5, 5], cotangent_bytes=[0, 3, 3])
    for schedule in (fdg.schedule.dni(3), fdg.schedule.dni_late(3, predicted=2, true=1)):
        assert [costs.sent_bytes(k, schedule) for k in (0, 1)] == [8, 8]
    for schedule in (fdg.schedule.gpipe(3, 4), fdg.schedule.adl(3, 2), fdg.schedule.backprop(3)):
        assert costs.sent_bytes(1, schedule) == 8


def test_hops_that_there_are_not():
    costs = Costs([1] * 3, [2] * 3)
    assert costs.sent_bytes(1, fdg.schedule.fdg(3)) == 0
    for k in (-1, 2):
        with pytest.raises(ValueError, match=f"k={k}: no hop of 3 stages"):
            costs.sent_bytes(k, fdg.schedule.fdg(3))
