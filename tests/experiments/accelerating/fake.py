"""A fake machine, runner and pieces."""

import json

from absl import flags

from experiments import accelerator
from experiments.accelerating.piece import MARK, Outcome, Piece
from experiments.accelerating.record import Record

MACHINE = {
    "versions": {"python": "3.11", "jax": "1", "jaxlib": "2", "fdg_jax": "3"},
    "devices": ["gpu:0"],
    "device_kind": "Test GPU",
    "cores": 16,
    "platform": "gpu",
    "memory_bytes": 80_000_000_000,
}


def chosen(*arguments: str) -> accelerator.Settings:
    values = flags.FlagValues()
    accelerator.define_flags(values)
    values(["accelerator", *arguments])
    return accelerator.from_flags(values)


def timed(ms: float, network: str, dtype: str, loop: str, peak: int | None = 2_500_000_000) -> str:
    """The output of the process of a case."""
    found = {
        "network": network,
        "about": "32x32, batch 128, SGD",
        "parameters": 270_000,
        "dtype": dtype,
        "contender": loop,
        "seconds": {"median": ms / 1e3, "min": 0.9 * ms / 1e3, "max": 1.1 * ms / 1e3},
        "peak_bytes": peak,
        "loss": 2.3,
    }
    return MARK + json.dumps(found)


class Fake:
    """A fake runner: every piece takes a given time and ends with a given status.

    Args:
      seconds: duration of every piece.
      ends: exit status and standard error by the piece's name.
    """

    def __init__(self, seconds: float, ends: dict[str, tuple[int, str]] | None = None) -> None:
        self.seconds, self.ends = seconds, ends or {}
        self.now = 0.0
        self.ran: list[str] = []

    def clock(self) -> float:
        return self.now

    def __call__(self, one: Piece, limit: float) -> Outcome:
        self.ran.append(one.name)
        took = min(self.seconds, limit)
        self.now += took
        status, err = self.ends.get(one.name, (0, ""))
        _, label, dtype, loop = (one.name + "///").split("/")[:4]
        out = timed(4.0, label, dtype, loop)
        return Outcome(status, took, self.seconds > limit, out, err)


def again(record: Record) -> Record:
    """What the next command reads."""
    found = Record(str(record.path), record.settings)
    found.of_machine(dict(MACHINE))
    return found


def times(*names: str) -> list[Piece]:
    return [Piece("times", f"times/{name}", ("true",), 30.0, "times") for name in names]
