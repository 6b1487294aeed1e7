"""A piece of the work: one command in its own process, and its outcome."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

# Prefix of the line of JSON with a process's results.
MARK = "found: "
# Seconds for a process to end on request before it is killed.
GRACE = 30.0
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "MemoryError")


@dataclass(frozen=True)
class Piece:
    """One command.

    Attributes:
      part: "tests", "times" or "training".
      name: unique, with slashes.
      command: the command.
      expected: expected seconds, before any measurement.
      group: pieces of a group take about the same time.
      environment: additional environment variables.
      folder: the working directory, or None for this one.
      resumes: whether it can be stopped and resumed.
      ends: seconds before the limit at which it is asked to stop.
      clears: a folder of an earlier attempt, removed at the start.
    """

    part: str
    name: str
    command: tuple[str, ...]
    expected: float
    group: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: pathlib.Path | None = None
    resumes: bool = False
    ends: float = 0.0
    clears: pathlib.Path | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a piece.

    Attributes:
      status: exit status.
      seconds: duration.
      cut: whether it was stopped at the time limit.
      out, err: its output.
    """

    status: int
    seconds: float
    cut: bool = False
    out: str = ""
    err: str = ""

    @property
    def error(self) -> str:
        """Why it failed, on one line."""
        if any(sign in self.err for sign in OUT_OF_MEMORY) or self.status == -signal.SIGKILL:
            return "out of memory"
        lines = (self.err.strip() or self.out.strip()).splitlines()[-1:]
        return f"status {self.status}: {' '.join(lines)[:300]}".rstrip(": ")


def run(piece: Piece, limit: float) -> Outcome:
    """Runs a piece for at most ``limit`` seconds; ends all its child processes."""
    began, cut = time.monotonic(), False
    environment = {**os.environ, **piece.environment}
    if piece.clears is not None:
        shutil.rmtree(piece.clears, ignore_errors=True)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # Its own session, so that Ctrl-C only reaches this program, which then stops the piece.
        process = subprocess.Popen(
            piece.command,
            stdout=out,
            stderr=err,
            cwd=piece.folder,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(max(limit - piece.ends, 1.0))
        except subprocess.TimeoutExpired:
            cut = True
        finally:
            _end(process)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Outcome(process.returncode, time.monotonic() - began, cut, *texts)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks the process group to stop, and kills it after a while."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):  # the group is empty
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
