"""A piece of the work: one command in a process of its own, and how it ended."""

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

# Precedes the line of JSON in which a process says what it has found.
MARK = "found: "
# Seconds that a process has to end in, once it is asked to.
GRACE = 30.0
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "MemoryError")


@dataclass(frozen=True)
class Piece:
    """One command.

    Attributes:
      part: "tests", "times" or "training".
      name: unique, with slashes.
      command: what is run.
      expected: seconds, before any is known.
      group: pieces of a group take about as long as each other.
      environment: variables beside those of this process.
      folder: the working directory, or None for this one.
      resumes: whether it can be stopped and goes on when it is run again.
      ends: seconds before the limit at which it is asked to stop.
      clears: a folder of an earlier attempt, which goes before it begins.
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
    """How a piece ended.

    Attributes:
      status: exit status.
      seconds: that it took.
      cut: whether it was stopped for lack of time.
      out, err: what it printed.
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
    """Runs a piece for ``limit`` seconds at most; ends with it whatever it has started."""
    began, cut = time.monotonic(), False
    environment = {**os.environ, **piece.environment}
    if piece.clears is not None:
        shutil.rmtree(piece.clears, ignore_errors=True)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # A session of its own: Ctrl-C is for this program, which then stops the piece.
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
    """Asks the group to stop, and ends what has not after a while."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):  # the group is empty
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
