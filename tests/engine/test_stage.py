"""A stage of several devices computes what a stage of one does."""

import jax
import pytest

import fdg_jax as fdg
from fdg_jax.checkpoint import Checkpointer
from tests import networks

SCHEDULES = {
    "fdg": fdg.schedule.fdg(2),
    "adl": fdg.schedule.adl(2, accumulate=3),
}
DATA = networks.batches(30)


def pipeline(schedule, devices: int, **options) -> fdg.Pipeline:
    stages = fdg.partition(networks.network(), 2, DATA[0][0], cost=[1] * 7)
    optimizer = networks.sgd(0.5, 2)
    chosen = jax.devices()[:devices]
    return fdg.Pipeline(stages, networks.loss_fn, optimizer, schedule, devices=chosen, **options)


def outcome(state: fdg.PipelineState) -> list:
    return jax.device_get([(s.params, s.model_state, s.opt_state) for s in state.stages])


@pytest.mark.parametrize("name", SCHEDULES)
def test_group_size_and_sharded_optimizers_change_nothing_but_rounding(name):
    one, _ = networks.run(pipeline(SCHEDULES[name], 2), DATA)
    for options in ({}, {"shard_optimizer": True}):
        two, _ = networks.run(pipeline(SCHEDULES[name], 4, **options), DATA)
        assert networks.difference(outcome(one), outcome(two)) <= 1e-12


def test_sharded_optimizer_state_is_shared_out_where_devices_divide_it():
    pipe = pipeline(SCHEDULES["fdg"], 4, shard_optimizer=True)
    state, _ = networks.run(pipe, DATA[:4])
    for own in state.stages:
        leaves = jax.tree.leaves(own.opt_state)
        for leaf in leaves:
            even = any(size and size % 2 == 0 for size in leaf.shape)
            share = leaf.addressable_shards[0].data.size
            assert share == (leaf.size // 2 if even else leaf.size)
        assert any(leaf.addressable_shards[0].data.size < leaf.size for leaf in leaves)
        whole = [leaf.is_fully_replicated for leaf in jax.tree.leaves(own.params)]
        assert all(whole)


def test_sharded_optimizer_state_is_restored_to_the_bit(tmp_path):
    pipe = pipeline(SCHEDULES["fdg"], 4, shard_optimizer=True)
    state = pipe.init(jax.random.key(7), DATA[0][0])
    for batch in DATA[:5]:
        state, _ = pipe.step(state, batch)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, 5)
        again, _ = checkpoints.restore(DATA[0])
    for a, b in zip(state.stages, again.stages, strict=True):
        same = [leaf.sharding for leaf in jax.tree.leaves(a.opt_state)]
        assert same == [leaf.sharding for leaf in jax.tree.leaves(b.opt_state)]
    assert networks.difference(outcome(state), outcome(again)) == 0
