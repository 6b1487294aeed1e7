"""Several processes make one run: the same bits, checkpoints that any number of them go on from."""

import json
import socket

import jax
import numpy as np
import pytest

from fdg_jax import distributed
from tests import processes
from tests.distributed import member

STEPS, AT = 12, 7


def members(num_processes: int, runs: list[dict], **settings) -> list[list[str]]:
    """The commands of a run of so many processes."""
    common = {
        "coordinator": f"127.0.0.1:{distributed.free_port()}",
        "num_processes": num_processes,
        "runs": runs,
        **settings,
    }
    return [
        ["tests.distributed.member", json.dumps({**common, "process_id": i})]
        for i in range(num_processes)
    ]


def run(num_processes: int, runs: list[dict]) -> list[processes.Result]:
    """A run of so many processes to its end."""
    return processes.run(members(num_processes, runs))


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
    narrow = {**fdg, "message_dtype": "int8"}
    others = gpipe, narrow, {**fdg, "tied": True}, {**fdg, "replace": True}
    found = results(run(2, [{**fdg, "save": str(tmp_path), "at": AT}, *others]))
    expected = member.result(**fdg)
    assert found == [expected, *(member.result(**one) for one in others)]
    # On in one process, and on in two.
    alone = member.result(**fdg, restore=str(tmp_path))
    assert alone["params"] == expected["params"]
    again = results(run(2, [{**fdg, "restore": str(tmp_path)}]))
    assert again == [alone]


@pytest.mark.slow
def test_stages_that_span_processes(tmp_path):
    fdg = {"schedule": "fdg", "num_stages": 2, "steps": STEPS, "shard_optimizer": True}
    gpipe = {"schedule": "gpipe", "num_stages": 2, "steps": STEPS, "on_nonfinite": "skip"}
    again = {**fdg, "restore": str(tmp_path)}
    others = gpipe, again, {**fdg, "tied": True}, {**fdg, "replace": True}
    found = results(run(4, [{**fdg, "save": str(tmp_path), "at": AT}, *others]))
    expected = [member.result(**one) for one in (fdg, *others)]
    # Both processes of the last stage say so.
    assert found == expected * 2
    assert expected[2]["params"] == expected[0]["params"]


def test_what_is_wrong_at_the_start_is_said_in_one_line_before_the_deadline():
    alone, nobody, unequal, differing = (members(2, []) for _ in range(4))

    def changed(command: list[str], **more) -> list[str]:
        return [command[0], json.dumps({**json.loads(command[1]), **more})]

    wrong = {
        "process 1 of 2 did not come within 3 s": changed(alone[0], seconds=3.0),
        "process 0 does not answer there within 3 s": changed(nobody[1], seconds=3.0),
        "SLURM, Open MPI or Kubernetes does not say": ["tests.distributed.member", '{"runs": []}'],
        "devices: the processes have 1, 2": unequal[0],
        "devices: the processes have 1, 2;": changed(unequal[1], local_devices=2),
        "steps=1 in process 0: process 1 has another value": differing[0],
        "steps=2 in process 1: process 0 has another value": changed(
            differing[1], agree={"steps": 2}
        ),
    }
    for expected, found in zip(wrong, processes.run(list(wrong.values())), strict=True):
        errors = [line for line in found.text.splitlines() if "error" in line]
        assert found.status == 2, found.text
        assert len(errors) == 1, found.text
        assert errors[0].startswith("error: ")
        assert expected in errors[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("127.0.0.1:1", 2, None), "give all three, or none"),
        (("127.0.0.1:1", 2, 2), r"process_id=2: must lie in 0\.\.1"),
        (("127.0.0.1", 2, 0), "coordinator=127.0.0.1: give host:port"),
        (("127.0.0.1:http", 2, 0), "coordinator=127.0.0.1:http: give host:port"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        distributed.initialize(*arguments)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"{address}: process 0 cannot listen there .*choose"):
            distributed.initialize(address, 2, 0)


def test_alone_everything_is_agreed_on_and_gathered():
    distributed.agree({"a": 1})
    assert distributed.gather(np.int32(3)).tolist() == [3]
