"""Kills one of the two processes of a run at a random moment, again and again.

    python -m tests.kills.members --kills=5

Each kill happens between the start and the end of the process, in two runs. Under
`experiments.launch --restarts=1` the run must end with the parameters of an undisturbed one. In two
processes without a launcher, the other must end within 30 seconds, with one error line that names
the killed process.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from typing import NamedTuple

from absl import flags

from experiments.common import command
from fdg_jax.distributed.initialize import free_port
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
    # A process killed before it has connected cannot be detected until this time.
    "--connect_seconds=25",
]
NUMBERS = ("params_sha256", "test_error", "test_loss", "best_test_error", "steps")
LONGEST = 30.0  # seconds that the other process may take to end


class Kill(NamedTuple):
    """The process to kill, and the seconds after its start."""

    process: int
    seconds: float


def result(folder: pathlib.Path) -> list[object]:
    summary = json.loads((folder / "summary.json").read_text())
    return [summary[name] for name in NUMBERS]


def watched(folder: pathlib.Path, kill: Kill | None) -> tuple[float, str]:
    """Runs under the launcher; returns the seconds and the output.

    Raises:
      ProcessLookupError: the process had ended before the kill.
    """
    program = [sys.executable, "-m", *PROGRAM, f"--workdir={folder}"]
    line = ["experiments.launch", "--num_processes=2", "--restarts=1", "--", *program]
    with processes.started([line]) as [(process, path)]:
        number = 0 if kill is None else kill.process
        pid = processes.member(process.pid, f"--process_id={number}")
        begin = time.monotonic()
        if kill is not None:
            time.sleep(kill.seconds)
            os.kill(pid, signal.SIGKILL)
        status = process.wait(timeout=processes.SECONDS)
        seconds, text = time.monotonic() - begin, path.read_text()
    if status:
        raise AssertionError(f"{kill}: status {status}\n{text}")
    if kill is not None and f"process {kill.process} of 2 was killed by SIGKILL" not in text:
        raise AssertionError(f"{kill}: was not noticed\n{text}")
    return seconds, text


def unwatched(folder: pathlib.Path, kill: Kill) -> tuple[float, str]:
    """Runs without a launcher; returns the seconds until the other ends, and its error line.

    Raises:
      ProcessLookupError: as above.
    """
    place = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    lines = [[*PROGRAM, f"--workdir={folder}", *place, f"--process_id={i}"] for i in range(2)]
    with processes.started(lines) as found:
        time.sleep(kill.seconds)
        if found[kill.process][0].poll() == 0:
            raise ProcessLookupError(f"{kill}: it had ended")
        found[kill.process][0].kill()
        begin = time.monotonic()
        other, path = found[1 - kill.process]
        status = other.wait(timeout=processes.SECONDS)
        seconds, text = time.monotonic() - begin, path.read_text()
    errors = re.findall(r"^error: (.*)", text, re.MULTILINE)
    if (
        status == 0
        or seconds > LONGEST
        or len(errors) != 1
        or f"process {kill.process} " not in errors[0]
    ):
        raise AssertionError(f"{kill}: status {status} after {seconds:.1f} s\n{text}")
    return seconds, errors[0]


def main() -> None:
    chance = random.Random(FLAGS.seed)
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root)
        seconds, _ = watched(folder / "whole", None)
        seconds, _ = watched(folder / "again", None)  # now with all programs in the cache
        expected = result(folder / "whole")
        print(
            f"undisturbed: {seconds:.1f} s, params_sha256 {expected[0]}\n",
            flush=True,
        )
        print("| killed | after | goes on after step | result | unwatched: ends after | says |")
        print("| --- | ---: | ---: | --- | ---: | --- |", flush=True)
        for i in range(FLAGS.kills):
            kill = Kill(i % 2, chance.uniform(0.1, 0.9 * seconds))
            while True:
                try:
                    _, text = watched(folder / f"watched{i}", kill)
                    alone, line = unwatched(folder / f"unwatched{i}", kill)
                    break
                except ProcessLookupError:  # the machine is less busy than it was
                    for name in (f"watched{i}", f"unwatched{i}"):
                        shutil.rmtree(folder / name, ignore_errors=True)
                    kill = kill._replace(seconds=0.8 * kill.seconds)
            equal = result(folder / f"watched{i}") == expected
            step = re.search(r"goes on after step (\d+)", text)
            cells = [f"process {kill.process}", f"{kill.seconds:.1f} s", step[1] if step else "-"]
            cells += ["equal" if equal else "DIFFERS", f"{alone:.1f} s", line]
            print(f"| {' | '.join(cells)} |", flush=True)
            if not equal:
                sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 5, "How many.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    command.run(main)
