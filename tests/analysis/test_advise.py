"""What is advised: predictions from given times against numbers by hand, and a measured network."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.analysis import Advice, Costs, Measured, Setting, advise, crossing, stage_bytes
from fdg_jax.analysis.layer_times import LayerTimes, layer_times
from fdg_jax.analysis.prediction import METHODS, costs_of, predict
from fdg_jax.analysis.stage_bytes import StageBytes
from fdg_jax.partition import units_of
from tests import networks


def times(scale: float = 1.0) -> LayerTimes:
    """Four equal layers: forward 1, backward with its update 2, all in one program 2.5 s."""
    return LayerTimes(*((scale * value,) * 4 for value in (1.0, 2.0, 2.5, 0.5)))


def stages(layers: dict[Setting, LayerTimes]) -> dict[int, dict[Setting, LayerTimes]]:
    """Of the whole network, and of two stages of two layers; as long as their layers."""
    return {
        k: {
            setting: LayerTimes(
                *(
                    tuple(sum(seconds[i : i + 4 // k]) for i in range(0, 4, 4 // k))
                    for seconds in own
                )
            )
            for setting, own in layers.items()
        }
        for k in (1, 2)
    }


LAYERS = {
    Setting(): times(),
    Setting(parts=4): times(0.25),
    Setting(shared_by=2): times(0.55),
}


SIZES = {
    1: StageBytes((8,), (8,), (40,), (10,), (10,)),
    2: StageBytes((8, 4), (8, 4), (20, 20), (5, 5), (5, 5)),
}
MEASURED = Measured(
    layers={Setting(): times()},
    stages=stages(LAYERS),
    cuts={2: (2,)},
    hops={2: (0.6,)},
    latency=0.1,
    sizes=SIZES,
    shared={2: StageBytes((4,), (4,), (20,), (10,), (10,))},
)


def test_predictions_by_hand():
    """Stage 0 takes 2 + 4 s, the last one 5 s, a message 0.6 s."""
    found = {(row.method, row.devices): row for row in predict(MEASURED)}
    assert list(found) == [("backprop", 1), *((name, 2) for name in METHODS)]
    seconds = {key: 1 / row.throughput for key, row in found.items()}
    assert seconds["backprop", 1] == pytest.approx(4 * 2.5)
    assert seconds["backprop", 2] == pytest.approx(6 + 5 + 2 * 0.6)
    assert seconds["data_parallel", 2] == pytest.approx(0.55 * 10)
    # Forward 2 s, message, all of the last stage 5 s, message, backward 4 s make two mini-batches.
    assert seconds["ddg", 2] == pytest.approx((2 + 0.6 + 5 + 0.6 + 4) / 2)
    assert seconds["fdg", 2] == pytest.approx(6)
    assert found["fdg", 2].speedup == pytest.approx(10 / 6)
    assert found["fdg", 2].cuts == (2,)
    assert [row.staleness for row in found.values()] == [(0,), (0, 0), (0,), (0, 0), (1, 0), (2, 0)]
    # Weights and momentum, 1 or 3 versions, input and residuals of 1 or 3 mini-batches.
    assert found["backprop", 1].bytes == (10 + 10 + 8 + 40,)
    assert found["fdg", 2].bytes == (3 * 5 + 5 + 3 * 28, 5 + 5 + 24)
    assert found["ddg", 2].bytes == (2 * 5 + 5 + 2 * 28, 5 + 5 + 24)
    assert found["data_parallel", 2].bytes == (10 + 10 + 4 + 20,)


def test_micro_batches_leave_the_update_to_the_end():
    costs = costs_of(MEASURED, "one_f_one_b", 2)
    # Of a quarter: forward 0.25, backward 0.5 with and 0.375 without its update, 0.125.
    assert costs.forward == (2.0, 2.0)
    assert costs.backward == (3.0, 3.0)
    assert costs.update == (0.25, 0.25)
    assert costs.transfer == (0.5,)
    assert costs.latency == 0.1


def test_stages_that_share_a_machine_have_times_of_their_own():
    """At K = 2 layers are half as fast; one stage after the other still has the machine alone."""
    shared = dataclasses.replace(
        MEASURED, stages=stages({**LAYERS, Setting(pipelines=2): times(2.0)})
    )
    seconds = {(row.method, row.devices): 1 / row.throughput for row in predict(shared)}
    assert seconds["fdg", 2] == pytest.approx(12)
    assert seconds["backprop", 2] == pytest.approx(12.2)
    assert seconds["backprop", 1] == pytest.approx(10)
    assert Advice.of(shared).choice.method == "data_parallel"


def test_what_is_not_measured_is_left_out():
    bare = dataclasses.replace(MEASURED, stages=stages({Setting(): times()}), shared={})
    assert [row.method for row in predict(bare)] == ["backprop", "backprop", "ddg", "fdg"]
    own = {Setting(): times()}
    alone = Measured(own, {1: stages(own)[1]}, {}, {}, 0.0, {1: SIZES[1]}, {})
    advice = Advice.of(alone)
    assert [row.method for row in advice.rows] == ["backprop"]
    assert advice.recommendation.startswith("Stay with back-propagation")
    assert advice.crossing is None
    assert "FDG" not in advice.recommendation


def without_messages(seconds: float) -> Measured:
    """Without data parallelism, and both stages equal."""
    layers = {Setting(): LayerTimes((1.0,) * 4, (1.5,) * 4, (2.5,) * 4, (0.5,) * 4)}
    return dataclasses.replace(
        MEASURED, stages=stages(layers), shared={}, hops={2: (seconds,)}, latency=0.0
    )


def test_recommendation_in_words():
    """DDG where messages are short, FDG where they are long."""
    short = Advice.of(without_messages(0.0))
    assert (short.choice.method, short.choice.devices) == ("ddg", 2)
    assert short.crossing == pytest.approx(0.05)
    for words in (
        "Take DDG with K = 2: 2.00 times the speed of back-propagation on one device.",
        "Its gradients are up to 1 update late.",
        "back-propagation on one device is the fastest, 1.00 times one device",
        "less than 100 % more steps",
        "a message takes 0.0 % of the slowest stage's time, and FDG is 1.00 times as fast",
        "where a message takes 5.0 % or more; below that DDG is the better choice",
    ):
        assert words in short.recommendation
    long = Advice.of(without_messages(1.0))
    assert (long.choice.method, long.choice.devices) == ("fdg", 2)
    assert long.message_share == pytest.approx(0.2)
    assert "FDG is 1.20 times as fast as DDG" in long.recommendation
    assert "up to 2 updates late" in long.recommendation


def test_stages_that_take_turns_are_not_recommended():
    """Back-propagation through two stages, of 2 + 1 and 2.5 seconds for each of two layers."""
    odd = LayerTimes((1.0,) * 4, (0.5,) * 4, (2.5,) * 4, (0.5,) * 4)
    kept = {Setting(): odd, Setting(pipelines=2): times(5.0)}
    advice = Advice.of(
        dataclasses.replace(MEASURED, stages=stages(kept), shared={}, hops={2: (0.0,)}, latency=0.0)
    )
    assert advice.row("backprop", 2).speedup == pytest.approx(10 / 8)
    assert advice.choice is advice.rows[0]
    assert "Stay with back-propagation on one device" in advice.recommendation


def test_the_text_has_inputs_rows_and_recommendation():
    advice = dataclasses.replace(Advice.of(MEASURED), notes=("a method, for a reason",))
    text = str(advice)
    words = [line.split() for line in text.splitlines()]
    assert ["0-3", "1000.000", "2000.000", "2500.000", "500.000"] in words
    assert ["all", "4000.000", "8000.000", "10000.000", "2000.000"] in words
    assert ["2", "600.000"] in words
    assert ["100.000", "of", "the", "smallest"] in words
    assert next(line for line in words if line[:1] == ["fdg"])[1:4] == ["2", "0.1667", "1.67"]
    assert "Left out: a method, for a reason." in text
    assert text.endswith(advice.recommendation)
    assert advice.row("ddg", 2).staleness == (1, 0)
    with pytest.raises(KeyError, match="fdg on 7 devices: was not predicted"):
        advice.row("fdg", 7)


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("slowest", [1.0, 1.2])
def test_crossing_follows_the_formula(stages, slowest):
    """2 (K-1) m / K is what messages add to DDG's tick, beyond the time in which others wait."""
    costs = Costs([1.0] * (stages - 1) + [slowest], [2.0] * (stages - 1) + [2 * slowest])
    each, most = 3.0, 3 * slowest
    # The last stage waits least where the loop through it and one other is the tightest.
    expected = min(
        ((loop + 1) * (1.05 * most) - (loop * each + most)) / (2 * loop)
        for loop in range(1, stages)
    )
    if slowest == 1:
        assert expected == pytest.approx(0.05 * each * stages / (2 * (stages - 1)))
    assert crossing(costs) == pytest.approx(expected / most, abs=2e-4)


def test_crossing_that_there_is_not():
    """The first stage waits for nobody: the last is fifty times as slow."""
    assert crossing(Costs([0.01, 1.0], [0.01, 2.0]), gain=0.9) is None


@pytest.mark.slow
def test_a_network_is_measured():
    block = networks.dense(6)
    layers = [networks.batch_norm(), fdg.repeat(fdg.chain([networks.dense(4)]), 3), block]
    x, labels = networks.batches(1)[0]
    devices = jax.devices()[:2]
    advice = advise(layers, (x, labels), devices, networks.loss_fn, optax.adam(0.1), seconds=0)
    rows = [("backprop", 1), *((name, 2) for name in METHODS)]
    assert [(row.method, row.devices) for row in advice.rows] == rows
    assert advice.notes == ()
    found = advice.measured.layers
    assert list(found) == [Setting(), Setting(2)]
    of_stages = advice.measured.stages
    assert list(of_stages[1]) == [Setting(), Setting(shared_by=2)]
    assert list(of_stages[2]) == [Setting(), Setting(2), Setting(2, parts=4)]
    for count, own in ((5, found), (1, of_stages[1]), (2, of_stages[2])):
        for setting, seconds in own.items():
            measured = [name for name, values in seconds._asdict().items() if values]
            assert measured == list(setting.programs)
            for name in measured:
                assert len(getattr(seconds, name)) == count
                assert min(getattr(seconds, name)) > 0
    # Equal layers are measured once.
    forward = found[Setting()].forward
    assert forward[1] == forward[2] == forward[3] != forward[4]
    assert all(math.isfinite(row.throughput) for row in advice.rows)
    row = advice.row("fdg", 2)
    assert advice.rows[0].speedup == 1
    assert row.staleness == (2, 0)
    assert len(advice.measured.hops[2]) == 1
    assert 0 < advice.measured.latency <= advice.measured.hops[2][0]
    # What the stages hold is what a pipeline of them holds.
    stages = fdg.partition(layers, 2, x, cost=row.cuts)
    pipe = fdg.Pipeline(stages, networks.loss_fn, optax.adam(0.1), fdg.schedule.fdg(2))
    sizes = stage_bytes(pipe, (x, labels))
    assert advice.measured.sizes[2] == sizes
    last = sizes.parameters[1] + sizes.optimizer[1] + sizes.inputs[1] + sizes.residuals[1]
    assert row.bytes[1] == last
    assert advice.recommendation in str(advice)


def test_shapes_alone_and_no_loss():
    layers = [
        fdg.from_fn(lambda x: jnp.eye(5)[x]),
        fdg.chain([networks.dense(4), networks.dropout()]),
    ]
    example = jax.ShapeDtypeStruct((3, 2), jnp.int32), None
    advice = advise(layers, example, jax.devices()[:2], microbatches=5, seconds=0)
    assert [row.method for row in advice.rows] == ["backprop", "backprop", "ddg", "fdg"]
    assert advice.notes == (
        "data_parallel on 2 devices: they do not divide a mini-batch of 3",
        "one_f_one_b: 5 parts do not divide a mini-batch of 3",
    )


def test_more_devices_than_layers():
    advice = advise([networks.dense(4)], (np.ones((4, 4)), None), jax.devices()[:2], seconds=0)
    assert [row.method for row in advice.rows] == ["backprop", "data_parallel"]
    assert advice.notes == ("K above 1: the network has 1 layers to cut between",)


@pytest.mark.parametrize("setting", [Setting(), Setting(pipelines=2), Setting(shared_by=2)])
def test_measured_programs_are_those_of_training(setting, monkeypatch):
    """Every run works on the state that the one before has left, and none on another's devices."""
    from fdg_jax.analysis import layer_times as module

    seen = []
    monkeypatch.setattr(module, "_sample", lambda benches, program, repeats: _keep(seen, benches))
    batch = networks.batches(1)[0]
    units = units_of([networks.dense(4), networks.batch_norm(), networks.dense(3)])
    rest = batch, networks.loss_fn, optax.sgd(0.1, 0.9), jax.devices()
    layer_times([(units, [setting])], *rest, seconds=0)
    groups = {id(benches): benches for benches in seen}.values()
    assert len(groups) == 3
    for benches in groups:
        meshes = [set(bench.stage.mesh.devices.flat) for bench in benches]
        assert len(set.union(*meshes)) == setting.pipelines * setting.shared_by
        bench = benches[0]
        params, before = jax.device_get((bench.params, bench.opt_state))
        if setting.shared_by > 1:
            assert (
                min(jax.tree.leaves(jax.tree.map(lambda v: len(v.devices()), bench.together())))
                == 2
            )
            continue
        new, _, down, *_ = jax.device_get(bench.backward())
        bench.opt_state = jax.device_put(before, bench.stage.replicated)
        again = jax.device_get(bench.backward())
        assert networks.difference(again[0], new) == 0
        # From the same optimizer state one program does what two do.
        bench.opt_state = jax.device_put(before, bench.stage.replicated)
        both = jax.device_get(bench.together())
        assert networks.difference(both[0], new) < 1e-12
        assert (down is None) == (both[3] is None)
        bench.gather(1)
        assert networks.difference(jax.device_get(bench.params), params) == 0
        bench.update()
        assert not bench.gradients


def _keep(seen, benches):
    if not any(benches is one for one in seen):
        seen.append(benches)
    return 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], (np.ones((4, 4)), None)), "layers=\\[\\]: there is nothing to advise on"),
        (([networks.dense(4)], np.ones((4, 4))), "example: must be \\(inputs, labels\\)"),
        (([len], (np.ones((4, 4)), None)), "layers\\[0\\]: a function is no layer"),
        (([networks.dense(4)], (np.ones((4, 4)), None), []), "devices=\\[\\]"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        advise(*arguments)
    with pytest.raises(ValueError, match="microbatches=0: must be 1 or more"):
        advise([networks.dense(4)], (np.ones((4, 4)), None), microbatches=0)
