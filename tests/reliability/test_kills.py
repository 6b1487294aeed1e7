"""Runs that are killed and started again: `python -m tests.kills`, cut to three settings.

The long version, and what came out of it, are in RELIABILITY.md.
"""

import random

import pytest
from absl import flags

import fdg_jax as fdg
from experiments.tasks import PROGRAMS
from experiments.training import methods
from experiments.training.remedies import REMEDIES
from fdg_jax.engine.rules import RULES
from tests.kills import run
from tests.kills.plan import GRADIENTS, METHODS, SETTINGS, Order, Setting, plan
from tests.kills.run import make_data, torment


@pytest.mark.parametrize(
    ("setting", "orders", "expected"),
    [
        (
            Setting("fdg", "recompute_stale", 3),
            # Back to the checkpoint that was taken in the fill; in the middle of writing another.
            [Order("saved:1"), Order("array file:4")],
            [{"newest": 3, "save": "none"}, {"save": "arrays"}],
        ),
        pytest.param(
            SETTINGS[-1],
            # In the fill; while it trains, from outside; after the last save.
            [Order("saved:1"), Order(lines=40, seconds=0.02), Order("write summary.json:1")],
            [{"newest": 3}, {"how": "outside"}, {"how": "aimed", "main": "end"}],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Setting("adl", "recompute", 2),
            # From outside, while it trains; after half of the drain.
            [Order(lines=30, seconds=0.02), Order("drain tick:2")],
            [{"how": "outside"}, {"how": "aimed", "main": "drain", "step": 30}],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Setting) else "",
)
def test_a_run_that_is_killed_ends_as_an_undisturbed_one(setting, orders, expected, tmp_path):
    make_data(tmp_path / "data")
    found = torment(setting, orders, tmp_path / "data", tmp_path)
    assert found["differences"] == [[]]
    assert found["missed"] == []
    assert len(found["kills"]) == len(expected)
    for kill, part in zip(found["kills"], expected, strict=True):
        assert kill | part == kill
    assert found["kills"][-1]["newest"] > 0  # all would begin anew otherwise


def test_a_moment_that_a_run_does_not_come_to_is_tried_after_another_kill(tmp_path, monkeypatch):
    tried = []

    def attempt(setting, data, workdir, order):
        if order is None:
            return None
        tried.append(order.moment)
        # Only what was killed in its drain has lines to cut.
        come = order.moment != "wrote metrics.jsonl:1" or tried[-2] == "drain tick:2"
        return {"moment": order.moment} if come else None

    monkeypatch.setattr(run, "attempt", attempt)
    monkeypatch.setattr(run, "start", lambda *given: None)
    monkeypatch.setattr(run, "end", lambda process: 0)
    monkeypatch.setattr(run, "differences", lambda run, whole: [])
    moments = ["saved:1", "wrote metrics.jsonl:1", "drain tick:2", "write summary.json:1"]
    orders = [Order(moment) for moment in moments]
    found = torment(SETTINGS[0], orders, tmp_path, tmp_path)
    assert found["missed"] == []
    assert tried == [*moments[:3], *moments[1:2], moments[3]]
    assert len(found["differences"]) == 2


def test_the_settings_are_a_spread():
    plain = [s for s in SETTINGS if s.gradient in GRADIENTS and s.method in METHODS]
    pairs = {(s.method, s.num_stages) for s in plain}
    assert pairs == {(m, k) for m in METHODS for k in (1, 2, 3, 4)}
    assert {(s.method, s.gradient) for s in plain} == {(m, g) for m in METHODS for g in GRADIENTS}
    assert {s.remedy for s in SETTINGS} == set(REMEDIES)
    assert len({s.name for s in SETTINGS}) == len(SETTINGS)
    for s in SETTINGS:
        values = flags.FlagValues()
        PROGRAMS[s.program].define_flags(values)
        values([s.program, "--workdir=run", *s.flags])
        config = PROGRAMS[s.program].from_flags(values)
        config.check()
        schedule = methods.schedule(config)
        assert s.fill == schedule.delay(0)
        assert s.in_flight == (len(list(schedule.stream(6))) > 6)


def test_every_kind_of_state_is_killed():
    schedules = [fdg.methods.create(s.method, s.num_stages)["schedule"] for s in SETTINGS]
    assert any(len(schedule.losses) > 1 for schedule in schedules)
    assert {schedule.name for schedule in schedules if schedule.predicts} == {"dni", "dni_late"}
    assert {s.gradient for s in SETTINGS} == set(RULES)
    assert {s.message_dtype for s in SETTINGS} == {"float32", "int8"}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_plan_repeats_and_has_a_kill_in_the_fill_if_there_is_one(setting):
    for share in (1, 4, 13):
        orders = plan(setting, share, random.Random(3))
        assert len(orders) == share
        assert orders == plan(setting, share, random.Random(3))
        assert any(o.moment.startswith("fill:") for o in orders) == (setting.fill > 0)
