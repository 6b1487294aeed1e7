"""Kills one of the two processes of a run at a random moment, again and again.

    python -m tests.kills.members --kills=5

A kill falls between the first line of the run, when both processes have found each other, and its
end. (Of one that dies before, the other says after --connect_seconds that it has not come.) Each
happens twice. Under `experiments.launch --restarts=1` the run must end with the
parameters of an undisturbed one. In two processes that nobody watches, the other must end within 30
seconds, with a line that names a process.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
from typing import NamedTuple

from absl import flags

from experiments import command
from fdg_jax.distributed import free_port
from tests import processes

FLAGS = flags.FLAGS
PROGRAM = [
    "experiments.cifar",
    "--train_size=400",
    "--batch_size=50",
    "--steps=40",
    "--num_stages=2",
    "--partition=flops",
    "--checkpoint_every_steps=4",
]
NUMBERS = ("params_sha256", "test_error", "test_loss", "best_test_error", "steps")
FIRST = "train, "  # in the first line
LONGEST = 30.0  # seconds that the other process may take to end
# Ours, which names process and stage; or JAX's, where no heartbeat came, or none from process 0.
NAMES = re.compile(
    r"^error: process [01] of 2: .*|following tasks are unhealthy.*:\n\d$|the leader task was \S+",
    re.MULTILINE,
)


class Kill(NamedTuple):
    """Which process, and how many seconds after the run's first line."""

    process: int
    seconds: float


def result(folder: pathlib.Path) -> list[object]:
    summary = json.loads((folder / "summary.json").read_text())
    return [summary[name] for name in NUMBERS]


def begun(*paths: pathlib.Path) -> None:
    """Waits for the run's first line."""
    end = time.monotonic() + processes.SECONDS
    while not any(FIRST in path.read_text() for path in paths):
        if time.monotonic() > end:
            raise AssertionError("\n".join(path.read_text() for path in paths))
        time.sleep(0.02)


def watched(folder: pathlib.Path, kill: Kill | None) -> tuple[float, str]:
    """Under the launcher: the seconds after its first line, and what it said."""
    program = [sys.executable, "-m", *PROGRAM, f"--workdir={folder}"]
    line = ["experiments.launch", "--num_processes=2", "--restarts=1", "--", *program]
    with processes.started([line]) as [(process, path)]:
        begun(path)
        begin = time.monotonic()
        if kill is not None:
            time.sleep(kill.seconds)
            os.kill(processes.member(process.pid, f"--process_id={kill.process}"), signal.SIGKILL)
        status = process.wait(timeout=processes.SECONDS)
        seconds, text = time.monotonic() - begin, path.read_text()
    if status:
        raise AssertionError(f"{kill}: status {status}\n{text}")
    if kill is not None and f"process {kill.process} of 2 was killed by SIGKILL" not in text:
        raise AssertionError(f"{kill}: was not noticed\n{text}")
    return seconds, text


def unwatched(folder: pathlib.Path, kill: Kill) -> tuple[float, str]:
    """Nobody ends the other: the seconds until it has, and the line that names a process."""
    place = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    lines = [[*PROGRAM, f"--workdir={folder}", *place, f"--process_id={i}"] for i in range(2)]
    with processes.started(lines) as found:
        begun(*(path for _, path in found))
        time.sleep(kill.seconds)
        found[kill.process][0].kill()
        begin = time.monotonic()
        other, path = found[1 - kill.process]
        status = other.wait(timeout=processes.SECONDS)
        seconds, text = time.monotonic() - begin, path.read_text()
    named = NAMES.search(text)
    if status == 0 or seconds > LONGEST or named is None:
        raise AssertionError(f"{kill}: status {status} after {seconds:.1f} s\n{text}")
    return seconds, " ".join(named[0].split())


def main() -> None:
    chance = random.Random(FLAGS.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        seconds, _ = watched(folder / "whole", None)
        seconds, _ = watched(folder / "again", None)  # all programs are in the cache now
        expected = result(folder / "whole")
        print(
            f"undisturbed: {seconds:.1f} s after its first line, params_sha256 {expected[0]}\n",
            flush=True,
        )
        print("| killed | after | goes on after step | result | unwatched: ends after | says |")
        print("| --- | ---: | ---: | --- | ---: | --- |", flush=True)
        for i in range(FLAGS.kills):
            kill = Kill(chance.randrange(2), chance.uniform(0, 0.8) * seconds)
            _, text = watched(folder / f"watched{i}", kill)
            equal = result(folder / f"watched{i}") == expected
            step = re.search(r"goes on after step (\d+)", text)
            alone, line = unwatched(folder / f"unwatched{i}", kill)
            cells = [f"process {kill.process}", f"{kill.seconds:.1f} s", step[1] if step else "-"]
            cells += ["equal" if equal else "DIFFERS", f"{alone:.1f} s", line]
            print(f"| {' | '.join(cells)} |", flush=True)
            if not equal:
                sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 5, "How many.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the processes and the moments.")
    command.run(main)
