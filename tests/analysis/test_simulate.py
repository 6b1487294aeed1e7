"""The simulator: timelines worked out by hand, exact ratios, and the order of a real run."""

import ast
import itertools
import json
import pathlib
import random
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.analysis import simulate as module
from fdg_jax.analysis import timeline
from fdg_jax.analysis.costs import Costs
from fdg_jax.analysis.simulate import simulate
from fdg_jax.engine import dispatch
from fdg_jax.schedule import NAMED, Action, Kind, Schedule

STAGES = [2, 3, 4, 8, 16, 64]


def equal(num_stages: int, **others) -> Costs:
    """Every stage: forward 1 s, backward 2 s."""
    return Costs([1] * num_stages, [2] * num_stages, **others)


def exact(num_stages: int) -> Costs:
    """The same in fractions, so that thirds are exact."""
    return Costs([Fraction(1)] * num_stages, [Fraction(2)] * num_stages)


def times(run: timeline.Timeline, k: int) -> str:
    """Forwards and backwards of stage k as text."""
    own = [e for e in run.events if e.action.stage == k and e.action.kind != "U"]
    return " ".join(f"{e.action.label}:{e.start:g}-{e.end:g}" for e in own)


BY_HAND = {
    ("backprop", 2, 2): [
        "F0:0-1 B0:4-6 F1:6-7 B1:10-12",
        "F0:1-2 B0:2-4 F1:7-8 B1:8-10",
    ],
    ("backprop", 3, 2): [
        "F0:0-1 B0:7-9 F1:9-10 B1:16-18",
        "F0:1-2 B0:5-7 F1:10-11 B1:14-16",
        "F0:2-3 B0:3-5 F1:11-12 B1:12-14",
    ],
    ("fdg", 2, 4): [
        "F0:0-1 F1:1-2 F2:2-3 B0:4-6 F3:6-7 B1:7-9 B2:10-12 B3:13-15",
        "F0:1-2 B0:2-4 F1:4-5 B1:5-7 F2:7-8 B2:8-10 F3:10-11 B3:11-13",
    ],
    ("fdg", 3, 4): [
        "F0:0-1 F1:1-2 F2:2-3 F3:3-4 B0:7-9 B1:10-12 B2:13-15 B3:16-18",
        "F0:1-2 F1:2-3 F2:3-4 B0:5-7 F3:7-8 B1:8-10 B2:11-13 B3:14-16",
        "F0:2-3 B0:3-5 F1:5-6 B1:6-8 F2:8-9 B2:9-11 F3:11-12 B3:12-14",
    ],
    ("ddg", 2, 3): [
        "F0:0-1 F1:1-2 B0:4-6 F2:6-7 B1:7-9 B2:10-12",
        "F0:1-2 B0:2-4 F1:4-5 B1:5-7 F2:7-8 B2:8-10",
    ],
    ("ddg", 3, 3): [
        "F0:0-1 F1:1-2 F2:2-3 B0:7-9 B1:10-12 B2:13-15",
        "F0:1-2 F1:2-3 B0:5-7 F2:7-8 B1:8-10 B2:11-13",
        "F0:2-3 B0:3-5 F1:5-6 B1:6-8 F2:8-9 B2:9-11",
    ],
}


@pytest.mark.parametrize(("name", "K", "batches"), BY_HAND)
def test_by_hand(name, K, batches):
    run = simulate(NAMED[name](K), equal(K), batches)
    assert [times(run, k) for k in range(K)] == BY_HAND[name, K, batches]
    assert run.makespan == max(e.end for e in run.events)
    for event in run.events:  # an update takes no time here, and follows the backward
        if event.action.kind == "U":
            assert event.start == event.end


def test_gpipe_by_hand():
    costs = Costs([2, 2], [4, 4])  # 1 s and 2 s a micro-batch
    run = simulate(fdg.schedule.gpipe(2, microbatches=2), costs, 2)
    assert [times(run, k) for k in range(2)] == [
        "F0.0:0-1 F0.1:1-2 B0.1:5-7 B0.0:7-9 F1.0:9-10 F1.1:10-11 B1.1:14-16 B1.0:16-18",
        "F0.0:1-2 F0.1:2-3 B0.1:3-5 B0.0:5-7 F1.0:10-11 F1.1:11-12 B1.1:12-14 B1.0:14-16",
    ]
    run = simulate(fdg.schedule.gpipe(3, microbatches=2), Costs([2] * 3, [4] * 3), 1)
    assert [times(run, k) for k in range(3)] == [
        "F0.0:0-1 F0.1:1-2 B0.1:8-10 B0.0:10-12",
        "F0.0:1-2 F0.1:2-3 B0.1:6-8 B0.0:8-10",
        "F0.0:2-3 F0.1:3-4 B0.1:4-6 B0.0:6-8",
    ]


def test_updates_take_their_time():
    run = simulate(fdg.schedule.fdg(2), equal(2, update=[0.5, 1]), 2)
    assert [f"{e.action}:{e.start:g}-{e.end:g}" for e in run.events if e.action.stage == 1] == [
        *("F0@1:1-2", "B0@1:2-4", "U@1:4-5"),
        *("F1@1:5-6", "B1@1:6-8", "U@1:8-9"),
    ]
    assert times(run, 0) == "F0:0-1 F1:1-2 B0:4-6 B1:8-10"  # the gradient leaves after the backward


@pytest.mark.parametrize("K", STAGES)
def test_delayed_methods_reach_K(K):
    for name in ("fdg", "ddg", "pipedream") if K < 64 else ("fdg", "ddg"):
        run = simulate(NAMED[name](K), exact(K), batches=3 * K + 3)
        assert run.throughput == Fraction(1, 3)
        assert run.speedup == K
        assert all(run.utilisation(k) == 1 for k in range(K))


@pytest.mark.parametrize("K", STAGES)
@pytest.mark.parametrize("M", [1, 3, 4])
def test_micro_batched_methods_reach_their_bubble(K, M):
    for maker in (fdg.schedule.gpipe, fdg.schedule.one_f_one_b):
        run = simulate(maker(K, microbatches=M), exact(K), batches=3)
        assert run.speedup == Fraction(M * K, M + K - 1)
        assert run.utilisation(K - 1) == Fraction(M, M + K - 1)


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("name", ["adl", "pipedream_2bw"])
def test_accumulating_methods_reach_K(name, K):
    run = simulate(NAMED[name](K, accumulate=5), exact(K))
    assert run.speedup == K
    assert run.in_flight(0) == NAMED[name](K, accumulate=5).in_flight(0)


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.5, 2.0, 4.0])
def test_transfers(K, seconds):
    """A round trip from stage k to the loss and back is shared by the batches in flight there."""
    costs = equal(K, transfer=seconds)
    for name, flying in (("fdg", lambda hops: 2 * hops + 1), ("ddg", lambda hops: hops + 1)):
        period = max((3 * (h + 1) + 2 * h * seconds) / flying(h) for h in range(K))
        assert simulate(NAMED[name](K), costs).throughput == pytest.approx(1 / period)
    plain = simulate(fdg.schedule.backprop(K), costs)
    assert plain.throughput == pytest.approx(1 / (3 * K + 2 * (K - 1) * seconds))
    assert plain.speedup == 1


def test_transfer_of_a_micro_batch_is_a_part_and_latency_is_not():
    plan = fdg.schedule.gpipe(2, microbatches=2)
    run = simulate(plan, Costs([2, 2], [4, 4], transfer=[1]), 1)
    assert times(run, 1) == "F0.0:1.5-2.5 F0.1:2.5-3.5 B0.1:3.5-5.5 B0.0:5.5-7.5"
    assert times(run, 0) == "F0.0:0-1 F0.1:1-2 B0.1:6-8 B0.0:8-10"
    run = simulate(plan, Costs([2, 2], [4, 4], latency=1), 1)
    assert times(run, 1) == "F0.0:2-3 F0.1:3-4 B0.1:4-6 B0.0:6-8"


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_slow_stage_bounds_throughput(name, slow):
    costs = Costs([1 + (k == slow) for k in range(3)], [2 * (1 + (k == slow)) for k in range(3)])
    run = simulate(NAMED[name](3), costs)
    assert run.throughput <= 1 / 6 * (1 + 1e-12)
    if name in ("fdg", "ddg", "pipedream", "adl", "pipedream_2bw"):
        assert run.throughput == pytest.approx(1 / 6)
        expected = [1 if k == slow else 0.5 for k in range(3)]
        assert [run.utilisation(k) for k in range(3)] == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMED)
def test_a_timeline_keeps_the_rules(name):
    """Uneven costs: inputs are there, devices do one thing at a time, orders are the stream's."""
    rng, K = random.Random(0), 4
    draw = [[rng.uniform(0.5, 2) for _ in range(K)] for _ in range(3)]
    costs = Costs(*draw, transfer=[0.3, 0.0, 0.7], latency=0.1)
    plan = NAMED[name](K)
    run = simulate(plan, costs, 12)
    ends = {e.action: e for e in run.events}
    stream = list(itertools.chain(*plan.stream(12)))
    assert [e.action for e in run.events] == stream
    for k in range(K):
        assert run.order(k) == [action for action in stream if action.stage == k]
        assert run.in_flight(k) == plan.in_flight(k)
        own = [e for e in run.events if e.device == k]
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))
    for event in run.events:
        length = costs.seconds(event.action, plan)
        assert event.end - event.start == pytest.approx(length)
    if name != "pipedream_2bw":  # its forwards name versions, what needs them does not
        for event in run.events:
            if event.action.kind != "U":
                needs = [ends[need] for need in plan.needs(event.action) if need in ends]
                assert needs or event.action.kind == "F"
                assert all(need.end <= event.start for need in needs)


@pytest.mark.parametrize("name", NAMED)
def test_order_is_what_a_run_dispatches(name, monkeypatch):
    """The actions of each stage, recorded as the engine's programs are called."""
    K, batches = 3, 8
    plan = NAMED[name](K)
    dispatched: list[list[tuple[str, int | None]]] = [[] for _ in range(K)]
    depth = 0

    def record(method: str, end: str) -> None:
        plain = getattr(dispatch.Tick, method)

        def recorded(self, k, *arguments):
            nonlocal depth
            if depth == 0:  # a fused action may be made of simple ones
                n = arguments[0] if arguments else None
                kinds = [kind.name for kind in arguments if isinstance(kind, Kind)] + list(end)
                dispatched[k].extend((kind, None if kind == "U" else n) for kind in kinds)
            depth += 1
            plain(self, k, *arguments)
            depth -= 1

        monkeypatch.setattr(dispatch.Tick, method, recorded)

    for method in ("forward", "backward", "backward_input", "teach"):
        record(method, "")
    for method in ("update", "backward_update", "train"):
        record(method, "U")
    scale = fdg.Layer(
        lambda key, x: (jnp.ones((), x.dtype), ()),
        lambda params, state, x, *, train, key: (params * x, state),
    )

    def loss(y, t):
        return jnp.mean((y - t) ** 2), {}

    losses = [loss if k in plan.losses else None for k in range(K)]
    own = fdg.Synthesizer(fdg.from_fn(lambda pair: pair[0] / 2), optax.sgd(0.1))
    synthesizers = own if plan.predicts else None
    pipe = fdg.Pipeline([scale] * K, losses, optax.sgd(0.01), plan, synthesizers=synthesizers)
    data = np.ones((4, 1))
    state = pipe.init(jax.random.key(0), data, data)
    for _ in range(batches):
        state, _ = pipe.step(state, (data, data))
    pipe.drain(state)

    def numbered(action: Action) -> tuple[str, int | None]:
        n = action.batch * plan.microbatches + (action.micro or 0)
        return action.kind, None if action.kind == "U" else n

    run = simulate(plan, equal(K), batches)
    assert [[numbered(a) for a in run.order(k)] for k in range(K)] == dispatched


def test_shared_devices():
    costs = equal(4, transfer=0.5)
    two = simulate(fdg.schedule.fdg(4), costs, shared=[0, 0, 7, 7])
    assert two.throughput == pytest.approx(1 / 6)
    assert [two.utilisation(k) for k in range(4)] == pytest.approx([0.5] * 4)
    assert {e.device for e in two.events} == {0, 7}
    one = simulate(fdg.schedule.fdg(4), costs, shared=[0] * 4)
    assert one.throughput == pytest.approx(1 / 12)
    assert one.speedup == pytest.approx(1)


@pytest.mark.parametrize("gradient", ["recompute", "recompute_stale"])
def test_recomputation_costs_a_forward(gradient):
    run = simulate(fdg.schedule.ddg(2), equal(2), gradient=gradient)
    assert times(run, 1).startswith("F0:1-2 B0:2-5 F1:5-6 B1:6-9")
    assert run.throughput == pytest.approx(1 / 4)
    assert run.speedup == pytest.approx(2 * 3 / 4)  # back-propagation has no need of it


@pytest.mark.parametrize(
    ("gradient", "held"),
    [
        ("stale", [4330, 4220]),
        ("recompute_stale", [4030, 4020]),
        ("recompute", [2030, 4020]),
        ("reconstruct", [3030, 4020]),  # the average of the changes, where there is staleness
    ],
)
def test_bytes_held(gradient, held):
    """FDG, K = 2. Stage 0 has three batches in flight, each with weights of its own."""
    costs = equal(
        2,
        input_bytes=[10, 20],
        residual_bytes=[100, 200],
        parameter_bytes=[1000, 2000],
        optimizer=1,
    )
    run = simulate(fdg.schedule.fdg(2), costs, 6, gradient=gradient)
    assert [run.peak_bytes(k) for k in range(2)] == held
    assert run.weight_versions(0) == (1 if gradient in ("recompute", "reconstruct") else 3)
    assert [run.in_flight(k) for k in range(2)] == [3, 1]


def test_bytes_held_of_micro_batches():
    costs = equal(2, input_bytes=[12, 12], residual_bytes=[100, 100], parameter_bytes=[1000] * 2)
    run = simulate(fdg.schedule.gpipe(2, microbatches=4), costs, 3)
    assert [run.microbatches_in_flight(k) for k in range(2)] == [4, 4]
    assert [run.peak_bytes(k) for k in range(2)] == [1112, 1112]
    run = simulate(fdg.schedule.one_f_one_b(2, microbatches=4), costs, 3)
    assert [run.microbatches_in_flight(k) for k in range(2)] == [2, 1]
    assert [run.peak_bytes(k) for k in range(2)] == [1056, 1028]
    assert [run.in_flight(k) for k in range(2)] == [1, 1]


@pytest.mark.parametrize("gradient", ["stale", "recompute"])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_two_versions_of_2bw(K, gradient):
    run = simulate(fdg.schedule.pipedream_2bw(K), equal(K), gradient=gradient)
    assert [run.weight_versions(k) for k in range(K)] == [2] * K


def test_steady_state_has_the_schedule_s_period():
    """DDG over a slow link: two batches close together, then none; the mean is exact."""
    run = simulate(fdg.schedule.ddg(2), equal(2, transfer=2), batches=40)
    assert run.throughput == pytest.approx(2 / 10)
    longer = simulate(fdg.schedule.ddg(2), equal(2, transfer=2), batches=41)
    assert longer.throughput == pytest.approx(2 / 10)


def test_chrome_trace():
    plan = fdg.schedule.gpipe(2, microbatches=2)
    trace = simulate(plan, equal(2, update=[1, 1]), 1).chrome_trace()
    assert json.loads(json.dumps(trace)) == trace
    rows = trace["traceEvents"]
    names = [r["args"]["name"] for r in rows if r["name"] == "thread_name"]
    assert names == ["stage 0", "stage 1"]
    complete = [r for r in rows if r["ph"] == "X"]
    assert len(complete) == 10
    assert {r["name"] for r in complete} == {"F0.0", "F0.1", "B0.0", "B0.1", "U"}
    assert {r["cat"] for r in complete} == {"fdg_jax"}
    second = next(r for r in complete if r["name"] == "F0.1" and r["tid"] == 1)
    assert (second["ts"], second["dur"]) == (1e6, 0.5e6)
    assert second["args"] == {"batch": 0, "micro": 1, "stage": 1, "device": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward": [], "backward": []}, "at least one stage"),
        ({"backward": [1]}, "backward: 1 numbers for the 2 stages"),
        ({"update": [0] * 3}, "update: 3 numbers"),
        ({"transfer": [1, 1]}, "transfer: 2 numbers for 2 stages; give one per hop, 1"),
        ({"forward": [1, -1.0]}, r"forward\[1\]=-1.0"),
        ({"backward": [float("nan"), 1]}, r"backward\[0\]=nan"),
        ({"transfer": float("inf")}, r"transfer\[0\]=inf"),
        ({"latency": -1}, "latency=-1"),
        ({"optimizer": float("nan")}, "optimizer=nan"),
        ({"parameter_bytes": [1, -1]}, r"parameter_bytes\[1\]=-1"),
        ({"forward": [0, 0], "backward": [0, 0]}, "all 0"),
    ],
)
def test_bad_costs(arguments, message):
    with pytest.raises(ValueError, match=message):
        Costs(**{"forward": [1, 1], "backward": [2, 2], **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 0}, "batches=0"),
        ({"gradient": "fresh"}, "gradient='fresh': allowed are stale, recompute_stale, recompute"),
        ({"shared": [0]}, "shared: 1 devices for 2 stages"),
        ({"costs": equal(3)}, "costs: of 3 stages, but schedule fdg is made for 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{"schedule": fdg.schedule.fdg(2), "costs": equal(2), **arguments})


def test_questions_without_an_answer():
    run = simulate(fdg.schedule.fdg(4), equal(4), batches=5)
    with pytest.raises(ValueError, match="batches=5: too few for a steady state of fdg"):
        _ = run.throughput
    with pytest.raises(ValueError, match="k=4: schedule fdg has stages 0 to 3"):
        run.order(4)


def test_the_half_for_the_weights_is_a_part_of_the_backward():
    with pytest.raises(ValueError, match=r"weights\[1\]=3: is a part of backward\[1\]=2; give"):
        Costs(forward=[1, 1], backward=[2, 2], weights=[1, 3])


def test_own_rule():
    """A schedule that is not one of the named: two forwards before two backwards."""

    def rule(t: int) -> list[Action]:
        if t % 2 == 0:
            return [Action("F", n, k) for n in (t, t + 1) for k in (0, 1)]
        both = [Action("B", n, k) for n in (t - 1, t) for k in (1, 0)]
        return [*both, Action("U", t, 1), Action("U", t, 0)]

    run = simulate(Schedule("pairs", 2, rule, period=2), equal(2))
    # F 0-1 and 1-2, then B 3-5 and 5-7 in stage 1, 5-7 and 7-9 in stage 0.
    assert run.throughput == pytest.approx(2 / 9)


@pytest.mark.parametrize("file", [module.__file__, timeline.__file__])
def test_no_device_is_touched(file):
    imported = set()
    for node in ast.walk(ast.parse(pathlib.Path(file).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    ours = {name for name in imported if name.startswith("fdg_jax")}
    assert ours <= {
        "fdg_jax.analysis.costs",
        "fdg_jax.analysis.memory",
        "fdg_jax.engine.gradient_rule",
        "fdg_jax.engine.rules",
        "fdg_jax.analysis.timeline",
        "fdg_jax.schedule",
        "fdg_jax.schedule.action",
        "fdg_jax.schedule.schedule",
    }
    assert {name.split(".")[0] for name in imported - ours} <= sys.stdlib_module_names
