"""Runs that are killed and started again: `python -m tests.kills`, cut to two settings.

The long version, and what came out of it, are in RELIABILITY.md.
"""

import random

import pytest

from experiments.training import methods
from experiments.training.config import Config
from tests.kills.plan import GRADIENTS, METHODS, SETTINGS, Order, Setting, plan
from tests.kills.run import make_images, torment


@pytest.mark.parametrize(
    ("setting", "orders", "expected"),
    [
        (
            Setting("fdg", "recompute_stale", 3),
            # Back to the checkpoint that was taken in the fill; in the middle of writing another.
            [Order("saved:1"), Order("array file:4")],
            [{"newest": 3, "save": "none"}, {"save": "arrays"}],
        ),
        (
            Setting("adl", "recompute", 2),
            # From outside, while it trains; after half of the drain.
            [Order(lines=30, seconds=0.02), Order("drain tick:2")],
            [{"how": "outside"}, {"how": "aimed", "main": "drain", "step": 30}],
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Setting) else "",
)
def test_a_run_that_is_killed_ends_as_an_undisturbed_one(setting, orders, expected, tmp_path):
    make_images(tmp_path / "images")
    found = torment(setting, orders, tmp_path / "images", tmp_path)
    assert found["differences"] == [[]]
    assert found["missed"] == []
    assert len(found["kills"]) == len(expected)
    for kill, part in zip(found["kills"], expected, strict=True):
        assert kill | part == kill
    assert found["kills"][-1]["newest"] > 0  # all would begin anew otherwise


def test_the_settings_are_a_spread():
    pairs = {(s.method, s.num_stages) for s in SETTINGS}
    assert pairs == {(m, k) for m in METHODS for k in (1, 2, 3, 4)}
    assert {(s.method, s.gradient) for s in SETTINGS} == {
        (m, g) for m in METHODS for g in GRADIENTS
    }
    for s in SETTINGS:
        config = Config("", method=s.method, num_stages=s.num_stages)
        assert s.fill == methods.schedule(config).delay(0)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_plan_repeats_and_has_a_kill_in_the_fill_if_there_is_one(setting):
    for share in (1, 4, 13):
        orders = plan(setting, share, random.Random(3))
        assert len(orders) == share
        assert orders == plan(setting, share, random.Random(3))
        assert any(o.moment.startswith("fill:") for o in orders) == (setting.fill > 0)
