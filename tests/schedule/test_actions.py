"""Actions, kinds and grids as data."""

import itertools
import pickle
import time

import pytest

import fdg_jax as fdg
from fdg_jax.schedule import Action, Schedule, parse
from fdg_jax.schedule.action import KINDS, SPLIT_KINDS

SCHEDULES = {
    **{name: make(3) for name, make in fdg.schedule.NAMED.items()},
    "fdg backward first": fdg.schedule.fdg(3, "backward_first"),
    "adl 5": fdg.schedule.adl(3, accumulate=5),
    "then": fdg.schedule.then(fdg.schedule.ddg(3), 4, fdg.schedule.fdg(3)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_a_value(name):
    schedule = SCHEDULES[name]
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.fingerprint == schedule.fingerprint
    assert again.grid(12) == schedule.grid(12)


def test_schedules_that_differ_in_any_option_are_unequal():
    for a, b in itertools.combinations(SCHEDULES.values(), 2):
        assert a != b
        assert a.fingerprint != b.fingerprint
    ten, twenty = (fdg.schedule.adl(2, accumulate=m) for m in (10, 20))
    assert str(ten) == str(twenty)  # of the ticks that are printed
    assert ten != twenty
    assert ten.fingerprint != twenty.fingerprint


def test_a_rule_that_is_no_dataclass_is_known_by_its_actions():
    def make(*kinds):
        return Schedule("own", 1, lambda t: [Action(kind, t, 0) for kind in kinds])

    assert make("F", "B", "U").fingerprint == make("F", "B", "U").fingerprint
    late = Schedule("own", 1, lambda t: [Action("F", t, 0), *(Action(k, t - 1, 0) for k in "BU")])
    assert late.fingerprint != make("F", "B", "U").fingerprint


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_printed_grid_is_read_back(name):
    schedule = SCHEDULES[name]
    ticks = parse(schedule.grid(9))
    assert len(ticks) == 9
    for t, found in enumerate(ticks):
        by_stage = [[a for a in schedule.tick(t) if a.stage == k] for k in range(3)]
        expected = list(itertools.chain(*by_stage))
        if name == "adl 5" or schedule.microbatches > 1:  # an update prints without its number
            expected, found = ([str(a) for a in row] for row in (expected, found))
        assert found == expected


@pytest.mark.parametrize("text", ["F@1", "3@1", "F3", "F3.@1", "U1.x@0", ""])
def test_what_is_no_action_is_refused(text):
    with pytest.raises(ValueError, match="is no action"):
        Action.parse(text)


def test_what_is_no_grid_is_refused():
    with pytest.raises(ValueError, match="is no grid"):
        parse("stage 0\n F0")


def test_what_an_action_needs_follows_from_its_kind():
    zero_bubble = fdg.schedule.zero_bubble(3)
    needs = {
        str(a): [str(need) for need in zero_bubble.needs(a)]
        for a in (Action("F", 0, 1, 2), Action("B", 0, 1, 2), Action("B", 0, 2, 2))
    }
    assert needs == {
        "F0.2@1": ["F0.2@0"],
        "B0.2@1": ["F0.2@1", "B0.2@2"],
        "B0.2@2": ["F0.2@2"],
    }
    weights = [str(need) for need in zero_bubble.needs(Action("W", 0, 1, 2))]
    assert weights == ["F0.2@1", "B0.2@1"]
    local = fdg.schedule.local(3)
    assert [str(need) for need in local.needs(Action("B", 5, 1))] == ["F5@1"]
    assert fdg.schedule.fdg(3).needs(Action("U", 5, 1)) == []


def test_kinds_are_checked():
    with pytest.raises(ValueError, match="two have one name"):
        Schedule("own", 1, fdg.schedule.fdg(1).rule, kinds=(*KINDS, SPLIT_KINDS[1]))
    with pytest.raises(ValueError, match=r"losses=\(3,\): must name stages, 0 to 1"):
        Schedule("own", 2, fdg.schedule.fdg(2).rule, losses=(3,))
    odd = Schedule("own", 1, lambda t: [Action("X", t, 0)])
    with pytest.raises(ValueError, match="X0@0 is of none of its kinds"):
        list(odd.stream(2))


def test_zero_bubble_fills_two_thirds_of_the_bubble():
    costs = fdg.simulate.Costs([1] * 4, [2] * 4)
    seconds = {
        make.__name__: 1 / fdg.simulate.simulate(make(4, 8), costs).throughput
        for make in (fdg.schedule.one_f_one_b, fdg.schedule.zero_bubble)
    }
    # An eighth of the batch takes 1/8 forward and 2/8 backward; the ideal is 3 s.
    assert seconds["one_f_one_b"] == pytest.approx(3 + 3 * 3 / 8)
    assert seconds["zero_bubble"] == pytest.approx(3 + 3 * 1 / 8)
    ours = fdg.schedule.zero_bubble(4, 8)
    run = fdg.simulate.simulate(ours, costs)
    assert max(run.microbatches_in_flight(k) for k in range(4)) <= 4  # as 1F1B's first stage


@pytest.mark.parametrize("make", [lambda: fdg.schedule.fdg(64), lambda: fdg.schedule.gpipe(16, 64)])
def test_counting_is_cheap(make):
    begin = time.process_time()
    schedule = make()
    schedule.in_flight(0)
    assert time.process_time() - begin < 0.5


def test_create_refuses_misspelt_options():
    with pytest.raises(ValueError, match=r"acumulate=3: no schedule has this option; .*accumulate"):
        fdg.schedule.create("adl", 2, acumulate=3)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (fdg.schedule.fdg(2), fdg.schedule.fdg(3), "num_stages=3, fdg has 2"),
        (fdg.schedule.gpipe(2, 4), fdg.schedule.fdg(2), "microbatches=1, gpipe has 4"),
        (fdg.schedule.ddg(2), fdg.schedule.pipedream_2bw(2), "name weight versions"),
    ],
)
def test_a_sequence_of_what_does_not_fit_is_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        fdg.schedule.then(first, 3, second)


def test_a_sequence_of_sequences_is_refused():
    two = fdg.schedule.then(fdg.schedule.backprop(2), 3, fdg.schedule.fdg(2))
    with pytest.raises(ValueError, match="second: backprop_then_fdg is a sequence already"):
        fdg.schedule.then(fdg.schedule.backprop(2), 3, two)
    with pytest.raises(ValueError, match="first: backprop_then_fdg is a sequence already"):
        fdg.schedule.then(two, 3, fdg.schedule.fdg(2))


def test_a_sequence_drains_in_between():
    schedule = fdg.schedule.then(fdg.schedule.fdg(2), 3, fdg.schedule.ddg(2))
    assert [line.split("|")[1].split() for line in schedule.grid(6).splitlines()[1:]] == [
        ["F0"],
        ["F1", "F0", "B0", "U"],
        ["F2", "B0", "U", "F1", "B1", "U"],
        ["B1", "U", "B2", "U", "F3", "F2", "B2", "U", "F3", "B3", "U"],
        ["F4", "B3", "U", "F4", "B4", "U"],
        ["F5", "B4", "U", "F5", "B5", "U"],
    ]
    assert [schedule.staleness(k) for k in range(2)] == [1, 0]
    costs = fdg.simulate.Costs([1, 1], [2, 2], transfer=1)
    found = [
        fdg.simulate.simulate(plan, costs).throughput for plan in (schedule, fdg.schedule.ddg(2))
    ]
    assert found[0] == pytest.approx(found[1])
