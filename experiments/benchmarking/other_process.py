"""A contender in its own process, which sleeps between its turns."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from experiments.benchmarking.contender import Contender


class OtherProcess(Contender):
    """A program that receives the number of steps of each turn on its standard input.

    It writes a line of JSON when it is ready, and one after each turn, with "seconds" and "loss".

    Args:
      name: as in --contenders.
      command: starts the program.

    Raises:
      RuntimeError: it ended before it was ready.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self.devices = name, 1
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.processes = (self._process.pid,)
        self.ready = self._answer()
        self.last: dict[str, Any] = {"loss": float("nan")}

    def turn(self, steps: int) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; `_answer` reports why
        self.last = self._answer()
        return float(self.last["seconds"])

    @property
    def loss(self) -> float:
        return float(self.last["loss"])

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        """The next line; if it has ended, raises `RuntimeError` with the last line of stderr."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:]
        self.close()
        raise RuntimeError(last[0] if last else f"status {self._process.returncode}")


class LeftOut(Exception):
    """The reason why a contender is skipped."""
