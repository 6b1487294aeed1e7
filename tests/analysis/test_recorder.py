"""What really ran when: seen from beside, nothing changed by looking."""

import itertools
import threading

import jax
import numpy as np
import pytest

import fdg_jax as fdg
from fdg_jax.analysis.recorder import Recorder, costs_of, expected
from fdg_jax.analysis.timeline import Event, Timeline
from fdg_jax.schedule import NAMED, Action
from tests import networks
from tests.engine.test_dispatch import BATCH, pipeline


def make(schedule: fdg.schedule.Schedule, **options) -> fdg.Pipeline:
    data = networks.batches(1)
    stages = fdg.partition(networks.network(), schedule.num_stages, data[0][0], cost=[1] * 7)
    optimizer = networks.sgd(1, schedule.num_stages)
    return fdg.Pipeline(stages, networks.loss_fn, optimizer, schedule, **options)


def whole(pipe: fdg.Pipeline, count: int) -> tuple[Timeline, fdg.PipelineState]:
    """A run from the fill to the drain, all of it recorded."""
    data = networks.batches(count)
    state = pipe.init(jax.random.key(7), data[0][0])
    recorder = Recorder(pipe, count)
    for batch in data:
        state, _ = pipe.step(state, batch)
    state, _ = pipe.drain(state)
    pipe.check()
    return recorder.timeline(), state


@pytest.mark.parametrize("name", ["fdg", "pipedream_2bw", "gpipe", "adl"])
def test_every_action_once_in_order_and_after_what_it_needs(name):
    pipe = make(NAMED[name](2))
    run, _ = whole(pipe, 6)
    assert [action for event in run.events for action in event.actions] == [
        action for tick in pipe.schedule.stream(6) for action in tick
    ]
    ends, free = {}, {}
    for event in run.events:
        assert free.get(event.device, 0) <= event.start <= event.end
        for action in event.actions:
            if action.kind == "U":
                continue
            for need in pipe.schedule.needs(action):
                assert ends.get((need.kind, need.batch, need.micro, need.stage), 0) <= event.end
            ends[action.kind, action.batch, action.micro, action.stage] = event.end
        free[event.device] = event.end
    assert min(event.start for event in run.events) == 0
    # Beside it, the same programs of the simulator.
    ideal = expected(run)
    assert [e.actions for e in ideal.events] == [e.actions for e in run.events]
    assert ideal.costs == run.costs


def test_starts_follow_from_ends():
    """With programs whose order and lengths are known: a pipeline with a slow stage."""
    pipe = pipeline(turns=20, max_ahead=4)
    state = pipe.init(jax.random.key(0), BATCH[0])
    for _ in range(8):
        state, _ = pipe.step(state, BATCH)
    recorder = Recorder(pipe, 12)
    for _ in range(14):  # the last one is not recorded: one tick served to find out
        state, _ = pipe.step(state, BATCH)
    assert not recorder.recording
    run = recorder.timeline()
    assert {e.action.batch for e in run.events if e.action.stage == 0 and e.action.kind == "F"} == (
        set(range(9, 21))
    )
    assert run.utilisation(1) > max(run.utilisation(0), run.utilisation(2))
    assert sum(run.at_once()) == pytest.approx(1)
    assert run.costs.forward[1] > run.costs.backward[1]  # its forward is the slow one
    rows = [row for row in run.chrome_trace()["traceEvents"] if row["ph"] == "X"]
    assert {"F9", "B7 U", "F8 B8 U"} & {row["name"] for row in rows}


def test_looking_changes_nothing_and_waits_for_nothing():
    results = []
    for recorded in (False, True):
        pipe = make(fdg.schedule.fdg(3))
        data = networks.batches(12)
        state = pipe.init(jax.random.key(7), data[0][0])
        recorder = Recorder(pipe, 8) if recorded else None
        with jax.transfer_guard("disallow"):
            for x, y in data:
                batch = jax.device_put((x, y), jax.devices()[0])
                state, metrics = pipe.step(state, batch)
        state, rest = pipe.drain(state)
        results.append(jax.device_get((pipe.params(state), metrics, rest)))
        assert recorder is None or len(recorder.timeline().events) > 8
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_step_returns_at_once_while_it_is_recorded():
    pipe = pipeline(turns=200, max_ahead=4)
    state = pipe.init(jax.random.key(0), BATCH[0])
    for _ in range(8):
        state, _ = pipe.step(state, BATCH)
    pipe.check()
    recorder = Recorder(pipe, 3)
    for _ in range(3):
        state, _ = pipe.step(state, BATCH)
    assert not state.stages[1].number.is_ready()
    recorder.timeline()
    assert state.stages[1].number.is_ready()  # timeline() waited


def test_threads_end_with_the_recording():
    before = threading.active_count()
    pipe = make(fdg.schedule.fdg(2))
    whole(pipe, 4)
    assert threading.active_count() == before
    assert pipe.watch is None
    again, _ = whole(pipe, 3)  # the same pipeline once more
    assert len(again.events) == 9


def test_stages_that_share_a_device_never_work_at_once():
    pipe = make(fdg.schedule.fdg(4), devices=jax.devices()[:2])
    run, _ = whole(pipe, 16)
    assert {e.device for e in run.events} == {0, 1}
    for device in (0, 1):
        own = [e for e in run.events if e.device == device]
        assert {e.action.stage // 2 for e in own} == {device}
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))
    assert run.at_once()[3:] == [0, 0]


def test_numbers_go_on_after_a_drain():
    pipe = make(fdg.schedule.fdg(2))
    data = networks.batches(9)
    state, _ = networks.run(pipe, data[:4])
    recorder = Recorder(pipe, 5)
    for batch in data[4:]:
        state, _ = pipe.step(state, batch)
    pipe.drain(state)
    run = recorder.timeline()
    assert {e.action.batch for e in run.events} == set(range(4, 9))


def test_costs_are_means_and_what_is_one_program_is_a_backward():
    def event(kinds: str, stage: int, start: float, end: float) -> Event:
        first, *rest = (Action(kind, 0, stage) for kind in kinds)
        return Event(first, start, end, stage, tuple(rest))

    schedule = fdg.schedule.fdg(3)
    events = [
        *(event("F", 0, 0, 1), event("F", 0, 1, 4), event("BU", 0, 4, 8)),
        *(event("F", 1, 0, 1), event("B", 1, 1, 3), event("BU", 1, 3, 6)),
        event("FBU", 2, 0, 5),
    ]
    costs = costs_of(schedule, "stale", events)
    assert (costs.forward, costs.backward, costs.update) == ((2, 1, 0), (4, 2, 5), (0, 1, 0))
    costs = costs_of(schedule, "recompute", events)
    assert (costs.forward, costs.backward) == ((2, 1, 0), (2, 1, 5))
    costs = costs_of(fdg.schedule.gpipe(3, microbatches=2), "stale", events)
    assert (costs.forward[0], costs.backward[1], costs.update[1]) == (4, 4, 1)


def test_what_is_refused():
    pipe = make(fdg.schedule.fdg(2))
    with pytest.raises(ValueError, match="batches=0: record at least one"):
        Recorder(pipe, 0)
    recorder = Recorder(pipe, 3)
    with pytest.raises(ValueError, match="pipe: is recorded already"):
        Recorder(pipe, 3)
    with pytest.raises(ValueError, match="nothing has been recorded"):
        recorder.timeline()
    assert pipe.watch is None
    run, _ = whole(pipe, 2)
    with pytest.raises(ValueError, match="batches=2: too few for a steady state of fdg"):
        _ = run.throughput
