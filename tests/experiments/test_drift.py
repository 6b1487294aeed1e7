"""experiments.drift: what it measures, and what it refuses."""

import numpy as np
import pytest

from experiments import drift
from tests.experiments import made


def run(folder, *arguments):
    return made.program("drift", f"--workdir={folder}", *arguments)


def test_distance_is_relative():
    a, b = (np.full(4, 3.0), np.zeros(2)), (np.full(4, 2.0), np.zeros(2))
    assert drift.distance(a, b) == pytest.approx(0.5)
