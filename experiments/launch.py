"""Starts a run with several processes on this machine.

    python -m experiments.launch --num_processes=2 -- python -m experiments.cifar --num_stages=2 ...

Adds --coordinator, --num_processes and --process_id to the command. Prints the output of each
process with its number, and writes it to a file with --logs. If a process fails, all end, and its
exit status is returned; with --restarts they restart from the newest checkpoint, with --nooverwrite
and --resume. Ctrl-C and SIGTERM are forwarded to all.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import IO

from absl import flags

from experiments.common import command, machine
from experiments.common.errors import UsageError
from experiments.training import setup
from fdg_jax import distributed
from fdg_jax.checkpoint.paths import local
from fdg_jax.distributed import failure_detector, rendezvous

FLAGS = flags.FLAGS
# Seconds for the others to report errors before they are killed.
GRACE = 3.0
TAIL = 20  # lines
# Exit statuses for which the others are not killed: success, and stopped on request.
PEACEFUL = (0, distributed.PAUSED)
USAGE = 2


def define_flags() -> None:
    flags.DEFINE_integer("num_processes", 2, "Number of processes.", lower_bound=1)
    flags.DEFINE_integer("restarts", 0, "Number of restarts after failures.", lower_bound=0)
    flags.DEFINE_string("logs", None, "Directory for process-0.log, process-1.log, ...")


class Member:
    """One process, its output, and the thread that reads it.

    Args:
      number: the process number.
      command: the command, run in its own process group, so that all its children can be ended.
      environment: its environment.
      log: additional destination of its output.
      ended: receives the member when its process ends.
    """

    def __init__(
        self,
        number: int,
        command: list[str],
        environment: dict[str, str],
        log: IO[bytes] | None,
        ended: queue.SimpleQueue[Member],
    ) -> None:
        self.number = number
        self.last: collections.deque[str] = collections.deque(maxlen=TAIL)
        self._log = log
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, args=(ended,), daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip()
            self.last.append(text)
            # One write, because other threads write, too.
            sys.stdout.write(f"[{self.number}] {text}\n")
            sys.stdout.flush()
            if self._log is not None:
                self._log.write(line)
                self._log.flush()

    def _wait(self, ended: queue.SimpleQueue[Member]) -> None:
        self.process.wait()
        ended.put(self)

    @property
    def status(self) -> int:
        """The exit status as in a shell: 128 plus the signal number."""
        code = self.process.returncode
        return 128 - code if code < 0 else code

    @property
    def fate(self) -> str:
        """A description of how the process ended."""
        code = self.process.returncode
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with status {code}"

    def send(self, number: int) -> None:
        """Sends a signal to all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def finish(self) -> None:
        """Ends the process and all its children."""
        self.send(signal.SIGKILL)
        self.process.wait()
        self._reader.join(timeout=GRACE)


def once(arguments: list[str], count: int, logs: pathlib.Path | None) -> Member | None:
    """Runs all processes to the end; returns the first that failed or was stopped."""
    ended: queue.SimpleQueue[Member] = queue.SimpleQueue()
    # With a new token, so that no other process can join or end the run.
    token = {rendezvous.TOKEN: secrets.token_hex(16)}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **token}
    if count >= machine.cores():
        environment["XLA_FLAGS"] = setup.one_thread(environment.get("XLA_FLAGS", ""))
    address = f"127.0.0.1:{distributed.free_port()}"
    members: list[Member] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for member in members:
            member.send(number)

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, forward))
        for i in range(count):
            log = (
                None
                if logs is None
                else stack.enter_context((logs / f"process-{i}.log").open("ab"))
            )
            place = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"]
            member = Member(i, [*arguments, *place], environment, log, ended)
            stack.callback(member.finish)
            members.append(member)
        asked = None
        for _ in members:
            member = _next(ended)
            if member.status not in PEACEFUL:
                _settle(members)
                return _cause([member, *members])
            asked = member if member.status else asked
        return asked


def _next(ended: queue.SimpleQueue[Member]) -> Member:
    """The next member to end; waits in short intervals, between which Python handles signals."""
    while True:
        with contextlib.suppress(queue.Empty):
            return ended.get(timeout=0.2)


def _cause(members: list[Member]) -> Member:
    """The first process that failed on its own."""
    ended = [member for member in members if member.process.poll() is not None]
    own = [member for member in ended if member.status not in (*PEACEFUL, failure_detector.LOST)]
    return (own or ended)[0]


def _settle(members: list[Member]) -> None:
    """Waits briefly for the other processes to end."""
    end = time.monotonic() + GRACE
    while time.monotonic() < end and any(m.process.poll() is None for m in members):
        time.sleep(0.05)


def main(arguments: list[str]) -> None:
    if not arguments:
        raise UsageError(
            "no command: give it after --, such as -- python -m experiments.cifar --num_stages=2"
        )
    try:
        logs = None if FLAGS.logs is None else local(FLAGS.logs, "--logs")
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--logs={FLAGS.logs}: cannot be made ({error.strerror})") from error
    more: list[str] = []
    for left in range(FLAGS.restarts, -1, -1):
        try:
            failed = once([*arguments, *more], FLAGS.num_processes, logs)
        except OSError as error:
            raise UsageError(f"{arguments[0]}: cannot be run ({error.strerror})") from error
        if failed is None or failed.status in PEACEFUL:
            sys.exit(0 if failed is None else failed.status)
        print(f"process {failed.number} {failed.fate}; its last lines:", file=sys.stderr)
        for line in failed.last:
            print(f"[{failed.number}] {line}", file=sys.stderr)
        again = left > 0 and failed.status != USAGE
        number = FLAGS.restarts - left + 1
        what = f"starting again, {number} of {FLAGS.restarts} times" if again else "all are ended"
        print(
            f"process {failed.number} of {FLAGS.num_processes} {failed.fate}; {what}",
            file=sys.stderr,
            flush=True,
        )
        if not again:
            sys.exit(failed.status)
        # Resumes the run, even if the command has --overwrite.
        more = ["--nooverwrite", "--resume"]


if __name__ == "__main__":
    define_flags()
    # Arguments after -- are not flags of this program.
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, rest = sys.argv[:end], sys.argv[end + 1 :]
    if "-m" in own:
        command.fail(UsageError("-m: is no flag of the launcher; put -- before the command"))
    sys.argv = own
    command.run(lambda: main(rest))
