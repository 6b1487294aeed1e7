"""experiments.drift: what it measures, and what it refuses."""

import json

import numpy as np
import pytest
from absl import flags

from experiments import drift
from experiments.common.errors import UsageError
from tests.experiments import made

TINY = ["--num_stages=3", "--blocks=2", "--steps=9", "--last=2", "--batch_size=4"]


@pytest.fixture
def given(monkeypatch):
    """The flags of the program, with other values."""
    values = flags.FlagValues()
    monkeypatch.setattr(drift, "FLAGS", values)
    for name in ("list", "integer", "string", "bool"):
        define = getattr(flags, f"DEFINE_{name}")
        monkeypatch.setattr(
            flags,
            f"DEFINE_{name}",
            lambda *a, define=define, **k: define(*a, flag_values=values, **k),
        )
    drift.define_flags()
    monkeypatch.setattr(drift.data, "load", lambda *a, **k: made.DATASET)

    def parse(*arguments: str) -> None:
        values(["drift", *arguments])

    return parse


def test_distance_is_relative():
    a, b = (np.full(4, 3.0), np.zeros(2)), (np.full(4, 2.0), np.zeros(2))
    assert drift.distance(a, b) == pytest.approx(0.5)


def test_drift_grows_with_the_rate(given, tmp_path):
    given(f"--workdir={tmp_path}", "--learning_rates=0.1,0.0001", *TINY)
    drift.main()
    found = json.loads((tmp_path / "drift.json").read_text())
    low, high = (row["drift"] for row in found["rows"])
    assert [row["learning_rate"] for row in found["rows"]] == [0.0001, 0.1]
    assert len(low) == 1  # one boundary: the last stage sends its true input
    assert 0 < low[0] < 0.01 < high[0]
    assert found["staleness"] == [4, 2, 0]
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_stages=2", "--num_stages=2: must be 3 or more"),
        ("--num_stages=9", "--blocks=2 make 4 layers; choose no more stages"),
        ("--steps=7", "--steps=7: must be 8 or more"),
        ("--learning_rates=0,1", "--learning_rates=0,1: give numbers above 0"),
        ("--learning_rates=x", "--learning_rates=x: give numbers above 0"),
    ],
)
def test_wrong_flags_are_named(given, tmp_path, flag, message):
    given(f"--workdir={tmp_path}", *TINY, flag)
    with pytest.raises(UsageError, match=message):
        drift.main()
