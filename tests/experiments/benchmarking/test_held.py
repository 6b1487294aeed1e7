"""Bytes that a stage holds: measured against the simulator and against all living arrays."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.benchmarking import contender, held
from experiments.benchmarking.workload import Workload
from experiments.text.settings import Settings
from experiments.text.task import Text
from experiments.training import setup
from fdg_jax.analysis import message_bytes
from fdg_jax.engine.state import StageWork
from tests.experiments.tiny import made
from tests.thinned import thinned


@pytest.mark.parametrize(
    "name",
    thinned(
        [
            "fdg",
            "fdg_recompute_stale",
            "fdg_recompute",
            "ddg",
            "adl",
            "pipedream_2bw",
            "gpipe",
            "pipemare",
            "dgl",
        ],
        keep=3,
    ),
)
def test_bytes_are_those_that_the_simulator_predicts(tiny, name):
    """Within 1 %: at this size nothing but the kinds that are listed apart differs."""
    settings = dataclasses.replace(tiny, num_stages=3, partition="2,4")
    found = held.table(made(settings, name))
    assert len(found) == 3
    for row in found:
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.01)
        assert row["total"] == sum(row["bytes"].values())
        assert row["bytes"]["weights"] > 0
        assert row["bytes"]["optimizer"] > 0
    # With a loss in every stage nothing waits for its backward.
    assert (found[0]["bytes"]["in flight"] > 0) == (name != "dgl")


@pytest.mark.parametrize("name", ["fdg", "dgl", "gpipe"])
def test_bytes_sent_are_those_of_the_messages(tiny, name):
    settings = dataclasses.replace(tiny, num_stages=3, partition="2,4")
    one = made(settings, name)
    sizes = message_bytes(one.pipe, one.batch)
    up, down = [*sizes.inputs[1:], 0], list(sizes.cotangents)
    if name == "dgl":
        down = [0, 0, 0]
    sent = [row["sent"] for row in held.table(one)]
    assert sent == [a + b for a, b in zip(up, down, strict=True)]
    assert sent[0] > 0


def test_a_synthesizer_is_counted_but_not_predicted(tiny):
    settings = dataclasses.replace(tiny, model="images", num_stages=2, partition="1")
    settings = dataclasses.replace(settings, image_size=4, synthesizer_width=2)
    one = made(settings, "dni")
    row, last = held.table(one)
    own = [one.state.stages[0].synthesizer, one.state.stages[0].model_state]
    assert row["bytes"]["small"] >= sum(leaf.nbytes for leaf in jax.tree.leaves(own)) > 0
    assert row["measured"] == pytest.approx(row["predicted"], rel=0.01)
    sizes = message_bytes(one.pipe, one.batch)
    assert (row["sent"], last["sent"]) == (sizes.inputs[1], sizes.cotangents[1])


def test_bytes_of_each_choice_of_gradient(tiny):
    names = ("fdg", "fdg_recompute_stale", "fdg_recompute")
    chosen = [made(tiny, name) for name in names]
    stale, again, fresh = (held.table(one)[0]["bytes"] for one in chosen)
    batch = 8 * 2 * 2 * 3 * 4
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(chosen[0].state.stages[0].params))
    # Three batches are in flight between the forward and the backward of stage 0.
    assert again["in flight"] == fresh["in flight"] == 3 * batch
    assert stale["in flight"] > 2 * again["in flight"]
    assert stale["weights"] == again["weights"] == 3 * weights
    assert fresh["weights"] == fresh["optimizer"] == weights


def test_bytes_agree_with_the_living_arrays(tiny):
    work = Workload(dataclasses.replace(tiny, num_stages=3, partition="2,4"))
    before = held.live()
    one = contender.make("fdg", work)
    one.turn(one.fill)
    held.table(one)
    living = {device: size - before[device] for device, size in held.live().items()}
    for k, stage in enumerate(one.pipe.stages):
        counted = sum(held.bytes_of(StageWork(one.state.stages[k])).values())
        batch = sum(v.nbytes for v in one.batch if v.devices() == set(stage.mesh.devices.flat))
        # The difference: keys, counters, tokens, metrics.
        device = str(stage.mesh.devices.flat[0])
        assert counted + batch == pytest.approx(living[device], abs=200)
        assert counted > 1000


def test_stages_that_reconstruct_their_inputs_hold_less_than_half(tiny):
    """In flight and as messages, against the forward that is run again; as predicted."""
    settings = dataclasses.replace(tiny, model="reversible", num_stages=4, partition="3,5,6")
    petra, again = (held.table(made(settings, name)) for name in ("petra", "fdg_recompute"))
    for row in petra:
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.01)
    # Stages 1 and 2 have couplings alone; stage 0 keeps the image. Messages down are pairs.
    assert petra[1]["bytes"]["in flight"] == petra[2]["bytes"]["in flight"] == 0
    assert _moving(petra[1]) <= 0.5 * _moving(again[1])
    assert petra[0]["bytes"]["in flight"] == again[0]["bytes"]["in flight"] > 0


@pytest.mark.slow
def test_so_do_stages_of_the_reversible_transformer():
    held_by = {}
    for method in ("petra", "dsp"):
        settings = Settings(
            "",
            method=method,
            num_stages=4,
            blocks=4,
            width=8,
            heads=2,
            context=8,
            batch_size=2,
            model="reversible_transformer",
            order="forward_first",
        )
        pipe = setup.make(Text(settings)).pipe
        x = np.zeros((2, 8), np.int32)
        state = pipe.init(jax.random.key(0), x, x)
        for _ in range(10):
            state, _ = pipe.step(state, (x, x))
        held_by[method] = [held.bytes_of(StageWork(own)) for own in state.stages]
    for petra, again in zip(held_by["petra"][1:-1], held_by["dsp"][1:-1], strict=True):
        assert petra["in flight"] == 0 < again["in flight"]
    first = [held_by[method][1] for method in ("petra", "dsp")]
    moving = [kinds["in flight"] + kinds["messages"] for kinds in first]
    assert moving[0] <= 0.5 * moving[1]


def _moving(row) -> int:
    return row["bytes"]["in flight"] + row["bytes"]["messages"]
