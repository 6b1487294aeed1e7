"""The launcher: all end with the first that fails, and a killed run ends as if it never was."""

import json
import os
import pathlib
import re
import signal
import sys
import time

import pytest

from tests import processes
from tests.thinned import thinned

COMMON = ["--steps=12", "--num_stages=2", "--log_every_steps=2", "--partition=flops"]
TEXT = ["--width=16", "--blocks=2", "--heads=2", "--context=16", "--batch_size=8"]
RUNS = {
    "cifar": ["--train_size=100", "--batch_size=50", "--eval_every_epochs=100"],
    "lm": [*TEXT, "--warmup_steps=2", "--eval_every_steps=100", "--validation_size=3000"],
}


def launch(*flags: str, command: list[str]) -> list[str]:
    return ["experiments.launch", *flags, "--", *command]


def script(tmp_path: pathlib.Path, text: str) -> list[str]:
    """A program that knows its number as ``me``."""
    path = tmp_path / "program.py"
    head = "import os, sys, time, signal, pathlib\nme = int(sys.argv[-1].split('=')[1])\n"
    path.write_text(head + text)
    return [sys.executable, str(path)]


def test_the_first_failure_ends_all_and_is_shown(tmp_path):
    program = script(
        tmp_path,
        "pathlib.Path(sys.argv[1], str(me)).write_text(str(os.getpid()))\n"
        "print('I am', me, *sys.argv[2:], flush=True)\n"
        "print('token', os.environ['FDG_RUN_TOKEN'], flush=True)\n"
        "if me == 1: time.sleep(1); sys.exit(7)\n"
        "time.sleep(1000)\n",
    )
    logs = tmp_path / "logs"
    command = launch(
        "--num_processes=3", f"--logs={logs}", command=[*program, str(tmp_path), "--a=1"]
    )
    [found] = processes.run([command])
    assert found.status == 7
    assert found.text.splitlines()[-1] == "process 1 of 3 ended with status 7; all are ended"
    assert len(set(re.findall(r"token ([0-9a-f]{32})$", found.text, re.MULTILINE))) == 1
    for i in range(3):
        assert f"[{i}] I am {i} --a=1 --coordinator=127.0.0.1:" in found.text
        assert (logs / f"process-{i}.log").read_text().startswith(f"I am {i} ")
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(i)).read_text()), 0)


def test_restarts_are_counted_and_end_with_success(tmp_path):
    program = script(
        tmp_path,
        "there = pathlib.Path(sys.argv[1], f'{me}-{time.time_ns()}')\n"
        "before = list(there.parent.glob(f'{me}-*'))\n"
        "there.touch()\n"
        "if len(before) < 2 and me == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if len(before) < 2: time.sleep(1000)\n"
        "print(me, *sys.argv[2:])\n",
    )
    command = [*program, str(tmp_path)]
    often, once = (launch("--num_processes=2", f"--restarts={n}", command=command) for n in (2, 1))
    [found] = processes.run([often])
    assert found.status == 0, found.text
    assert found.text.count("process 0 of 2 was killed by SIGKILL; starting again") == 2
    for i in range(2):
        line = next(x for x in found.text.splitlines() if x.startswith(f"[{i}] {i} "))
        assert line.endswith(f"--process_id={i}") or "--nooverwrite --resume" in line
    for path in tmp_path.glob("[01]-*"):
        path.unlink()
    [found] = processes.run([once])
    assert found.status == 128 + signal.SIGKILL
    assert found.text.splitlines()[-1] == "process 0 of 2 was killed by SIGKILL; all are ended"


def test_signals_reach_all_and_stopping_is_no_failure(tmp_path):
    program = script(
        tmp_path,
        "signal.signal(signal.SIGTERM, lambda *a: sys.exit(75))\n"
        "pathlib.Path(sys.argv[1], f'up-{me}').touch()\n"
        "time.sleep(1000)\n",
    )
    command = launch("--num_processes=2", "--restarts=3", command=[*program, str(tmp_path)])
    with processes.started([command]) as [(process, path)]:
        end = time.monotonic() + processes.SECONDS
        while len(list(tmp_path.glob("up-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=processes.SECONDS) == 75, path.read_text()


def test_what_is_wrong_with_the_command_is_one_line():
    commands = [["experiments.launch"], launch(command=["/no/such/program"])]
    for found, complaint in zip(
        processes.run(commands), ("no command: give it after --", "cannot be run"), strict=True
    ):
        assert found.status == 2
        assert found.text.startswith("error: ")
        assert complaint in found.text
        assert len(found.text.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", thinned(RUNS))
def test_a_process_that_is_killed_leaves_no_trace_in_the_result(name, tmp_path):
    """One of two dies by SIGKILL; with a restart the parameters are those of an undisturbed run."""
    one, two = tmp_path / "one", tmp_path / "two"
    program = [f"experiments.{name}", *COMMON, *RUNS[name]]
    [found] = processes.run([[*program, f"--workdir={one}"]])
    assert found.status == 0, found.text
    command = [sys.executable, "-m", *program, f"--workdir={two}", "--checkpoint_every_steps=3"]
    launcher = launch("--num_processes=2", "--restarts=1", command=command)
    with processes.started([launcher]) as [(process, path)]:
        end = time.monotonic() + processes.SECONDS
        while not list(two.glob("checkpoints/step-*")) and time.monotonic() < end:
            assert process.poll() is None, path.read_text()
            time.sleep(0.02)
        os.kill(processes.member(process.pid, "--process_id=1"), signal.SIGKILL)
        assert process.wait(timeout=processes.SECONDS) == 0, path.read_text()
        text = path.read_text()
    assert "process 1 of 2 was killed by SIGKILL; starting again" in text
    assert "goes on after step" in text
    expected, there = (json.loads((folder / "summary.json").read_text()) for folder in (one, two))
    for summary in (expected, there):
        for times in ("train_seconds", "images_per_second", "bytes_per_second"):
            summary.pop(times, None)
    assert there == expected
    assert len(there["params_sha256"]) == 64


def test_who_failed_because_another_did_is_not_blamed(tmp_path):
    program = script(
        tmp_path,
        "if me == 0: sys.exit(69)\nprint('the cause', flush=True)\ntime.sleep(0.5)\nsys.exit(5)\n",
    )
    [found] = processes.run([launch("--num_processes=2", command=program)])
    assert found.status == 5
    lines = found.text.splitlines()
    assert lines[-2:] == ["[1] the cause", "process 1 of 2 ended with status 5; all are ended"]
