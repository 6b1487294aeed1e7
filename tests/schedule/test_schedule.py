"""Schedules: who does what when, and the numbers that follow from it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fdg_jax as fdg
from fdg_jax.schedule import Action, Schedule

ORDERS = ["forward_first", "backward_first"]
MAKERS = {
    "backprop": fdg.schedule.backprop,
    **{order: lambda K, order=order: fdg.schedule.fdg(K, order) for order in ORDERS},
}
schedules = st.builds(
    lambda name, K: MAKERS[name](K), st.sampled_from(sorted(MAKERS)), st.integers(1, 6)
)

GRIDS = {
    ("forward_first", 2): """\
tick | stage 0   stage 1
   0 | F0
   1 | F1        F0 B0 U
   2 | F2 B0 U   F1 B1 U
   3 | F3 B1 U   F2 B2 U""",
    ("backward_first", 2): """\
tick | stage 0   stage 1
   0 | F0
   1 | F1        F0 B0 U
   2 | B0 U F2   F1 B1 U
   3 | B1 U F3   F2 B2 U""",
    ("backprop", 2): """\
tick | stage 0   stage 1
   0 | F0 B0 U   F0 B0 U
   1 | F1 B1 U   F1 B1 U
   2 | F2 B2 U   F2 B2 U
   3 | F3 B3 U   F3 B3 U""",
    ("forward_first", 3): """\
tick | stage 0   stage 1   stage 2
   0 | F0
   1 | F1        F0
   2 | F2        F1        F0 B0 U
   3 | F3        F2 B0 U   F1 B1 U
   4 | F4 B0 U   F3 B1 U   F2 B2 U
   5 | F5 B1 U   F4 B2 U   F3 B3 U""",
    ("backward_first", 3): """\
tick | stage 0   stage 1   stage 2
   0 | F0
   1 | F1        F0
   2 | F2        F1        F0 B0 U
   3 | F3        B0 U F2   F1 B1 U
   4 | B0 U F4   B1 U F3   F2 B2 U
   5 | B1 U F5   B2 U F4   F3 B3 U""",
    ("backprop", 3): """\
tick | stage 0   stage 1   stage 2
   0 | F0 B0 U   F0 B0 U   F0 B0 U
   1 | F1 B1 U   F1 B1 U   F1 B1 U
   2 | F2 B2 U   F2 B2 U   F2 B2 U
   3 | F3 B3 U   F3 B3 U   F3 B3 U
   4 | F4 B4 U   F4 B4 U   F4 B4 U
   5 | F5 B5 U   F5 B5 U   F5 B5 U""",
}


@pytest.mark.parametrize(("name", "K"), GRIDS)
def test_prints_itself_as_a_grid(name, K):
    schedule = MAKERS[name](K)
    assert str(schedule) == GRIDS[name, K]
    assert schedule.grid(2) == "\n".join(GRIDS[name, K].splitlines()[:3])


def test_columns_stay_aligned_when_numbers_grow():
    lines = fdg.schedule.fdg(2).grid(12).splitlines()
    assert lines[0] == "tick | stage 0    stage 1"
    assert lines[-1] == "  11 | F11 B9 U   F10 B10 U"


def test_a_grid_without_ticks_is_its_head():
    assert fdg.schedule.fdg(2).grid(0) == "tick | stage 0   stage 1"


@pytest.mark.parametrize(
    ("order", "table"),
    [
        ("forward_first", [[0], [2, 0], [4, 2, 0], [6, 4, 2, 0]]),
        ("backward_first", [[0], [1, 0], [3, 1, 0], [5, 3, 1, 0]]),
    ],
)
def test_staleness_is_the_papers_table(order, table):
    for K, row in enumerate(table, start=1):
        schedule = fdg.schedule.fdg(K, order)
        assert [schedule.staleness(k) for k in range(K)] == row
        assert [schedule.mean_staleness(k) for k in range(K)] == row


@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("order", ORDERS)
def test_delay_first_update_and_peak_in_flight(order, K):
    schedule = fdg.schedule.fdg(K, order)
    assert schedule.num_stages == K
    ticks = list(schedule.stream(3 * K))
    for k in range(K):
        assert schedule.delay(k) == 2 * (K - 1 - k)
        first = next(t for t, tick in enumerate(ticks) if Action("U", 0, k) in tick)
        assert first == 2 * (K - 1) - k
        peak = 2 * (K - 1 - k) + (order == "forward_first" or k == K - 1)
        assert schedule.in_flight(k) == peak


@pytest.mark.parametrize("K", [1, 2, 4])
def test_backprop_waits_for_nothing_old(K):
    schedule = fdg.schedule.backprop(K)
    assert schedule.num_stages == K
    for k in range(K):
        assert (schedule.delay(k), schedule.staleness(k), schedule.in_flight(k)) == (0, 0, 1)


@given(schedules, st.integers(0, 12))
def test_every_batch_passes_every_stage_once_in_causal_order(schedule, batches):
    last = schedule.num_stages - 1
    done = set()
    for action in (a for tick in schedule.stream(batches) for a in tick):
        kind, n, k = action.kind, action.batch, action.stage
        assert 0 <= n < batches
        assert 0 <= k <= last
        assert action not in done
        if kind == "F" and k > 0:
            assert Action("F", n, k - 1) in done
        if kind == "B":
            assert Action("F", n, k) in done
            assert k == last or Action("B", n, k + 1) in done
        if kind == "U":
            assert Action("B", n, k) in done
        done.add(action)
    assert len(done) == 3 * batches * schedule.num_stages


@given(schedules, st.integers(0, 12))
def test_a_run_is_its_ticks_without_the_batches_that_do_not_exist(schedule, batches):
    run = list(schedule.stream(batches))
    for t, actions in enumerate(run):
        assert actions == [a for a in schedule.tick(t) if a.batch < batches]
        assert actions == schedule.tick(t, batches)
    assert all(a.batch >= 0 for t in range(20) for a in schedule.tick(t))
    assert not any(schedule.tick(t, batches) for t in range(len(run), len(run) + 20))


@given(st.sampled_from(ORDERS), st.integers(2, 6), st.integers(0, 30))
def test_in_fdg_no_stage_waits_inside_a_tick(order, K, t):
    schedule = fdg.schedule.fdg(K, order)
    earlier = {a for s in range(t) for a in schedule.tick(s)}
    for action in schedule.tick(t):
        if action.kind == "F" and action.stage > 0:
            assert Action("F", action.batch, action.stage - 1) in earlier
        if action.kind == "B" and action.stage < K - 1:
            assert Action("B", action.batch, action.stage + 1) in earlier


def accumulate(t):
    """One stage that updates with every third batch."""
    actions = [Action("F", t, 0), Action("B", t, 0)]
    return actions + [Action("U", t, 0)] * (t % 3 == 2)


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 7])
def test_a_partial_accumulation_is_applied_at_the_end(batches):
    run = list(Schedule("accumulate", 1, accumulate).stream(batches))
    updates = [a for tick in run for a in tick if a.kind == "U"]
    assert len(updates) == -(-batches // 3)
    assert run[-1][-1] == Action("U", batches - 1, 0)


def test_accumulated_gradients_wait_in_flight():
    schedule = Schedule("accumulate", 1, accumulate)
    assert (schedule.in_flight(0), schedule.staleness(0), schedule.delay(0)) == (3, 0, 0)


def test_staleness_is_the_largest_and_mean_staleness_the_mean():
    def alternating(t):  # odd batches come back one tick later, after an update
        n = t if t % 2 == 0 else t - 2
        head, tail = [Action("F", t, 0)], []
        if t % 2 == 0:
            tail = [Action(kind, b, 0) for b in (t - 1, n) for kind in "BU"]
        return head + tail

    schedule = Schedule("alternating", 1, alternating)
    # Batch 2m+1 is forwarded before, and applied in, tick 2m+2: nothing in between. Batch 2m+2 is
    # forwarded there as well, and meets the update of 2m+1.
    assert schedule.staleness(0) == 1
    assert schedule.mean_staleness(0) == 0.5


@pytest.mark.parametrize("K", [0, -1])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_no_stage_is_refused(make, K):
    with pytest.raises(ValueError, match=f"num_stages={K}"):
        make(K)


def test_another_order_is_refused_and_named():
    with pytest.raises(ValueError, match=r"order='sideways'.*forward_first.*backward_first"):
        fdg.schedule.fdg(2, "sideways")


@pytest.mark.parametrize("k", [2, -1])
def test_a_stage_that_does_not_exist_is_no_answer(k):
    with pytest.raises(ValueError, match=f"k={k}: schedule fdg has stages 0 to 1"):
        fdg.schedule.fdg(2).delay(k)


def rule(*kinds_and_delays):
    """One stage that does each kind for the batch of so many ticks ago."""
    return lambda t: [Action(kind, t - delay, 0) for kind, delay in kinds_and_delays]


def exhaust(schedule, batches=3, limit=2_000):
    """The whole stream, or a failure where it does not end."""
    ticks = list(itertools.islice(schedule.stream(batches), limit))
    assert len(ticks) < limit, "the stream does not end"
    return ticks


BROKEN = {
    "no backward": (rule(("F", 0)), "left in flight"),
    "no action at all": (rule(), "left in flight"),
    "backward first": (rule(("B", 0), ("F", 0), ("U", 0)), "B0@0 comes before F0@0"),
    "backward a tick early": (rule(("F", 1), ("B", 0), ("U", 0)), "B0@0 comes before F0@0"),
}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        *(pytest.param(*case, id=name) for name, case in BROKEN.items()),
        pytest.param(lambda t: [Action("F", 0, 0)], "comes twice", id="same forward"),
        pytest.param(
            lambda t: [Action("F", t, 0), Action("U", 0, 0)],
            "U@0 in tick 0 applies nothing",
            id="update of nothing",
        ),
        pytest.param(rule(("F", 0), ("B", 0), ("B", 0), ("U", 0)), "twice", id="B twice"),
    ],
)
def test_a_rule_that_is_no_schedule_is_refused_and_does_not_hang(broken, message):
    with pytest.raises(ValueError, match=f"schedule broken: .*{message}"):
        exhaust(Schedule("broken", 1, broken))


def test_a_long_but_finite_delay_is_no_error():
    late = Schedule("late", 1, rule(("F", 0), ("B", 7), ("U", 7)))
    assert len(exhaust(late)) == 10
    assert (late.delay(0), late.staleness(0), late.in_flight(0)) == (7, 7, 8)


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action("F", 3, 1), "F3@1"),
        (Action("B", 1, 0), "B1@0"),
        (Action("U", 5, 0), "U@0"),
    ],
)
def test_an_action_prints_as_the_design_writes_it(action, text):
    assert str(action) == text
