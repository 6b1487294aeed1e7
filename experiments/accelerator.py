"""Tests, times and trains on an accelerator: one command for a new machine.

    python -m experiments.accelerator --workdir=results/h100

tests: the oracle's and some of the engine's tests, and a few steps of every program. times: a step
of back-propagation, the engine with K = 1, and FDG with K = 2, 4, 8 on one device, compiled and
dispatched, with peak memory. training: the paper's recipe for ResNet-20 and ResNet-56 with
back-propagation, FDG and DDG. Every piece is a process; none needs the network.

Pieces that do not fit into --minutes are not started. Repeat the command to continue: exit status
75 means that pieces remain, 0 that all are done. Writes accelerator.json, accelerator.md and
accelerator.png after every piece.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from experiments import data
from experiments.accelerating import case, chart, checks, host, network, piece, tables, training
from experiments.accelerating.piece import Outcome, Piece
from experiments.accelerating.record import FAILED, STOPPED, Record, folder, found_in
from experiments.common import command, fields
from experiments.common.errors import Failed, Stopped, UsageError

FLAGS = flags.FLAGS
PARTS = ("tests", "times", "training")
# Speed is irrelevant in rehearsals, so compilation is kept cheap.
REHEARSED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

Runner = Callable[[Piece, float], Outcome]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings; each field is the flag of that name."""

    workdir: str
    minutes: float = 8.0
    parts: tuple[str, ...] = PARTS
    networks: tuple[str, ...] = tuple(network.NETWORKS)
    dataset: str = training.BUNDLED
    data_dir: str | None = None
    epochs: int = training.EPOCHS
    rehearse: bool = False
    retry_failed: bool = False

    def check(self) -> None:
        """Raises `UsageError` for the first invalid value."""
        if not self.workdir:
            raise UsageError("--workdir: is missing; name the folder for the results")
        if not 0 < self.minutes < math.inf:
            raise UsageError(f"--minutes={self.minutes}: must be above 0; 8 is usual")
        known = network.TINY if self.rehearse else network.NETWORKS
        for name, allowed in (("parts", PARTS), ("networks", tuple(known))):
            given = getattr(self, name)
            if not given or not set(given) <= set(allowed):
                raise UsageError(
                    f"--{name}={','.join(given)}: no such choice; give at least one of "
                    f"{', '.join(allowed)}"
                )
        if not 1 <= self.epochs < 2**31:
            raise UsageError(f"--epochs={self.epochs}: must be 1 or more; the recipe has 300")

    @property
    def shared(self) -> dict[str, Any]:
        """The settings common to all pieces of a workdir."""
        return {name: getattr(self, name) for name in ("rehearse", "dataset", "epochs")}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    own = Settings("")
    text = "Directory for results and runs."
    flags.DEFINE_string("workdir", "", text, flag_values=values)
    text = "No piece is begun that does not fit into this time; a training is stopped at its end."
    flags.DEFINE_float("minutes", own.minutes, text, flag_values=values)
    flags.DEFINE_list("parts", list(PARTS), f"Any of {', '.join(PARTS)}.", flag_values=values)
    text = f"Networks to time, any of {', '.join(network.NETWORKS)}; default: all."
    flags.DEFINE_list("networks", None, text, flag_values=values)
    text = "To train on, as in experiments.cifar; default: cifar10 if it is there, else "
    text += f"{training.BUNDLED}."
    flags.DEFINE_string("dataset", None, text, flag_values=values)
    text = "Directory of prepared data sets and archives."
    flags.DEFINE_string("data_dir", None, text, flag_values=values)
    text = "Of a training; the milestones of the learning rate move in proportion."
    flags.DEFINE_integer("epochs", own.epochs, text, flag_values=values)
    text = "Whether tiny networks take a few steps, to try the command on any machine."
    flags.DEFINE_bool("rehearse", False, text, flag_values=values)
    text = "Whether pieces that failed are run again."
    flags.DEFINE_bool("retry_failed", False, text, flag_values=values)


def from_flags(parsed: flags.FlagValues = flags.FLAGS) -> Settings:
    """The settings given by the flags, checked."""
    given: dict[str, Any] = fields.given(Settings, parsed)
    known = network.TINY if given["rehearse"] else network.NETWORKS
    given["networks"] = tuple(known if given["networks"] is None else given["networks"])
    given["parts"] = tuple(given["parts"])
    wanted = given["dataset"] or (training.BUNDLED if given["rehearse"] else None)
    given["dataset"] = training.dataset(wanted, given["data_dir"])
    settings = Settings(**given)
    settings.check()
    return settings


def plan(settings: Settings, platform: str) -> list[Piece]:
    """All pieces of the chosen parts, in execution order."""
    own, found = settings, []
    if "tests" in own.parts:
        found += checks.pieces(folder(own.workdir, "smoke"), platform, own.rehearse)
    if "times" in own.parts:
        found += case.pieces(list(own.networks), own.rehearse)
    if "training" in own.parts:
        runs = folder(own.workdir, "training")
        found += training.pieces(runs, own.dataset, own.data_dir, own.epochs, own.rehearse)
    if own.rehearse:
        found = [
            dataclasses.replace(one, environment={**REHEARSED, **one.environment}) for one in found
        ]
    return found


def work(
    pieces: Sequence[Piece],
    record: Record,
    minutes: float,
    runner: Runner = piece.run,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Runs the missing pieces that fit the time limit; writes the files after every piece.

    Args:
      pieces: all pieces.
      record: the record of the workdir, with its machine.
      minutes: the time limit. The first piece is started regardless of its expected time, so that
        every command makes progress.
      runner: runs a piece with a time limit in seconds.
      clock: the time in seconds.

    Returns:
      The number of remaining pieces.
    """
    deadline = clock() + 60 * minutes
    pending = record.pending(pieces)
    print(f"{len(pieces) - len(pending)} pieces finished, {len(pending)} remaining", flush=True)
    save(record, len(pending))
    begun = 0
    for one in pending:
        left = deadline - clock()
        if begun and record.expected(one) > left:
            continue
        row = record.note(one, runner(one, left), whole=not begun)
        begun += 1
        remaining = len(record.pending(pieces))
        save(record, remaining)
        done = len(pieces) - remaining
        print(f"{done}/{len(pieces)}  {one.name}  {summary(row)}", flush=True)
    return len(record.pending(pieces))


def save(record: Record, remaining: int) -> None:
    """Writes accelerator.json, accelerator.md and accelerator.png."""
    text = tables.markdown(record.machine, record.settings, record.rows)
    rehearsed = bool(record.settings["rehearse"])
    record.write(text, chart.draw(record.machine, record.rows, rehearsed=rehearsed), remaining)


def summary(row: dict[str, Any]) -> str:
    """A row as text for the console."""
    if row["state"] == FAILED:
        return f"FAILED  {row['error']}  {row['seconds']:.0f} s"
    found, parts = row["found"], []
    if row["state"] == STOPPED:
        parts.append("not finished")
    if row["part"] == "times" and found:
        parts.append(f"{1e3 * found['seconds']['median']:.3g} ms a step")
    if row["part"] == "training" and found:
        parts.append(f"epoch {found['epoch']:.4g} of {found['epochs']}")
        if found["error"] is not None:
            parts.append(f"{found['split']} error {100 * found['error']:.2f} %")
    return "  ".join([*parts, f"{row['seconds']:.0f} s"])


def stop(*_: object) -> None:
    """Handles SIGTERM: stops the current piece; the same command continues."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the piece needs time to end
    raise Stopped("stopped; the same command goes on")


def main() -> None:
    began = time.monotonic()
    settings = from_flags()
    record = Record(settings.workdir, settings.shared)
    signal.signal(signal.SIGTERM, stop)
    if "training" in settings.parts:
        # Detects errors of the data set early and fills the cache of decoded images.
        data.load(settings.dataset, settings.data_dir)
        print(f"trains on {settings.dataset}", flush=True)
    if settings.retry_failed:
        record.forget_failed()
    looked = piece.run(host.piece(), 60 * settings.minutes)
    if looked.status:
        raise Failed(f"JAX finds no device: {looked.error}")
    record.of_machine(found_in(looked))
    kind, platform = (record.machine[name] for name in ("device_kind", "platform"))
    print(f"{kind} ({platform})", flush=True)
    pieces = plan(settings, platform)
    spent = (time.monotonic() - began) / 60
    remaining = work(pieces, record, max(settings.minutes - spent, 0.0))
    failed = [name for name, row in record.rows.items() if row["state"] == FAILED]
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}")
    print(f"results in {record.path / 'accelerator.md'}", flush=True)
    if remaining:
        raise Stopped(f"{remaining} pieces remain; the same command goes on")


if __name__ == "__main__":
    define_flags()
    command.run(main)
