"""Several processes make one run: the same bits, checkpoints that any number of them go on from."""

import json

import jax
import pytest

from fdg_jax import distributed
from tests import member, processes

STEPS, AT = 12, 7


def run(num_processes: int, runs: list[dict], **settings) -> list[processes.Result]:
    """A run of so many processes to its end."""
    common = {
        "coordinator": f"127.0.0.1:{distributed.free_port()}",
        "num_processes": num_processes,
        "runs": runs,
        **settings,
    }
    return processes.run(
        [["tests.member", json.dumps({**common, "process_id": i})] for i in range(num_processes)]
    )


def results(found: list[processes.Result]) -> list[dict]:
    """What the process of the last stage found, once all have ended well."""
    assert [r.status for r in found] == [0] * len(found), "\n".join(r.text for r in found)
    lines = [line for r in found for line in r.text.splitlines() if line.startswith("result {")]
    return [json.loads(line.removeprefix("result ")) for line in lines]


@pytest.fixture
def two_devices(monkeypatch):
    """The devices that one process needs to have what two processes have together."""
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)


def test_two_processes_train_to_the_bits_of_one_and_go_on_from_checkpoints(tmp_path, two_devices):
    fdg = {"schedule": "fdg", "num_stages": 2, "steps": STEPS}
    gpipe = {**fdg, "schedule": "gpipe", "on_nonfinite": "skip"}
    found = results(run(2, [{**fdg, "save": str(tmp_path), "at": AT}, gpipe]))
    expected = member.result(**fdg)
    assert found == [expected, member.result(**gpipe)]
    # On in one process, and on in two.
    alone = member.result(**fdg, restore=str(tmp_path))
    assert alone["params"] == expected["params"]
    again = results(run(2, [{**fdg, "restore": str(tmp_path)}]))
    assert again == [alone]
