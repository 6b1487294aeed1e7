"""Settings shared by the tests of the benchmark."""

import jax
import pytest

import fdg_jax as fdg
from experiments.benchmarking.workload import Settings
from experiments.common import machine
from tests.experiments.tiny import QUIET, tiny_network


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Settings:
    """Settings of a network that compiles quickly, on an idle machine."""
    # Starts JAX with the devices of all tests: a benchmark requests as many as there are cores.
    assert len(jax.devices()) == 4
    monkeypatch.setattr(fdg.models, "create", tiny_network)
    monkeypatch.setattr(machine, "at_rest", lambda max_load: (dict(QUIET), None))
    monkeypatch.setattr(machine, "cores_of_others", lambda before, after: 0.05)
    folder = str(tmp_path / "run")
    sizes = {"image_size": 2, "batch_size": 8, "rounds": 3, "steps": 2}
    return Settings(folder, model="tiny", partition="3", **sizes)
