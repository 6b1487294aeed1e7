"""A contender in its own processes, which sleep between their turns."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from experiments.benchmarking.contender import Contender


class OtherProcess(Contender):
    """Programs that receive the number of steps of each turn on their standard input.

    Each writes a line of JSON when it is ready, and one after each turn, with "seconds" and "loss";
    its loss is null where it has none.

    Args:
      name: as in --contenders.
      commands: start the programs, all at once.

    Raises:
      RuntimeError: one ended before it was ready.
    """

    def __init__(self, name: str, *commands: Sequence[str]) -> None:
        self.name, self.devices = name, len(commands)
        self._members = [_Member(command) for command in commands]
        self.processes = tuple(member.process.pid for member in self._members)
        self.last: list[dict[str, Any]] = [{"loss": float("nan")}]
        self.ready = self._answers()

    def turn(self, steps: int) -> float:
        for member in self._members:
            member.ask(steps)
        self.last = self._answers()
        return max(float(answer["seconds"]) for answer in self.last)

    @property
    def loss(self) -> float:
        return mean_loss(self.last, "loss")

    def close(self) -> None:
        for member in self._members:
            member.end_of_input()
        for member in self._members:
            member.close()

    def _answers(self) -> list[dict[str, Any]]:
        """The next line of each; ends all of them where one has ended."""
        with concurrent.futures.ThreadPoolExecutor(len(self._members)) as pool:
            asked = [pool.submit(member.answer) for member in self._members]
            done, _ = concurrent.futures.wait(asked, return_when="FIRST_EXCEPTION")
            failed = [error for one in done if (error := one.exception()) is not None]
            if failed:
                for member in self._members:
                    member.process.kill()
        if failed:
            self.close()
            raise failed[0]
        return [one.result() for one in asked]


class _Member:
    """One of the programs."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._input, self._output = self.process.stdin, self.process.stdout

    def ask(self, steps: int) -> None:
        try:
            self._input.write(f"{steps}\n")
            self._input.flush()
        except OSError:
            pass  # it has ended, and its answer says why

    def answer(self) -> dict[str, Any]:
        """The next line; raises `RuntimeError` with the last line of its errors where it ended."""
        line = self._output.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:]
        raise RuntimeError(last[0] if last else f"status {self.process.returncode}")

    def end_of_input(self) -> None:
        """Asks it to end."""
        with contextlib.suppress(OSError):  # a line is left that it will not read
            self._input.close()

    def close(self) -> None:
        """Waits for its end, and ends it if that takes long."""
        self.end_of_input()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._output.close()
        self._errors.close()


def mean_loss(answers: Sequence[dict[str, Any]], name: str) -> float:
    """The mean over the processes that have a loss; NaN if none has."""
    found = [float(answer[name]) for answer in answers if answer.get(name) is not None]
    return sum(found) / len(found) if found else float("nan")


class LeftOut(Exception):
    """The reason why a contender is skipped."""
