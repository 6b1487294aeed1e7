"""Runs of several processes for tests, with deadlines; no process outlives its test."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.conftest import CACHE

ROOT = pathlib.Path(__file__).parent.parent
# Much more than needed: hanging tests must end, but slow machines must not fail tests.
SECONDS = 300.0


class Result(NamedTuple):
    """Exit status and output (stdout and stderr) of a process."""

    status: int
    text: str


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that runs this copy of the package on CPUs, without warnings."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    return {**kept, **cache, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **more}


@contextlib.contextmanager
def started(
    commands: Sequence[Sequence[str]], **more: str
) -> Iterator[list[tuple[subprocess.Popen, pathlib.Path]]]:
    """Starts ``python -m`` commands, each in its own process group, which is killed at the end."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        found = []
        for i, command in enumerate(commands):
            path = pathlib.Path(folder, str(i))
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=environment(**more),
                stdin=subprocess.DEVNULL,
                stdout=stack.enter_context(path.open("wb")),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(_kill, process)
            found.append((process, path))
        yield found


def run(commands: Sequence[Sequence[str]], seconds: float = SECONDS, **more: str) -> list[Result]:
    """Runs commands in parallel; those beyond the time limit are killed and fail."""
    with started(commands, **more) as found:
        return [Result(process.wait(timeout=seconds), path.read_text()) for process, path in found]


def member(launcher: int, flag: str) -> int:
    """The process that the launcher started with a flag; waits for it."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_bytes().decode().split("\0")
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:  # it has just ended
                continue
            if parent == launcher and flag in arguments:
                return int(folder.name)
        time.sleep(0.01)
    raise AssertionError(f"no process with {flag}")


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
