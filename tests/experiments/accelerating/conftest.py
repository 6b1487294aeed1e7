"""An empty record."""

import pytest

from experiments.accelerating.record import Record
from tests.experiments.accelerating.fake import MACHINE, chosen


@pytest.fixture
def record(tmp_path) -> Record:
    made = Record(str(tmp_path / "out"), chosen("--workdir=x").shared)
    made.of_machine(dict(MACHINE))
    return made
