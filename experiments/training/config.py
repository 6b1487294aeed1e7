"""The settings common to all runs, checked before anything is done."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from experiments.common.errors import UsageError
from experiments.training import family, methods, remedies, writers
from fdg_jax.engine.rules import RULES

ORDERS = ("forward_first", "backward_first")
GRADIENTS = tuple(RULES)
REDUCTIONS = ("mean", "sum")
MESSAGE_DTYPES = ("float32", "bfloat16", "int8")
ON_NONFINITE = ("stop", "skip")
# Settings that may change when a run is resumed: normally they only affect files.
FREE = (
    "workdir",
    "data_dir",
    "overwrite",
    "resume",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "keep_checkpoints",
    "on_nonfinite",
    "timeline",
    "profile",
    "writers",
)


@dataclasses.dataclass(frozen=True)
class Config(remedies.Remedies, family.Family):
    """The settings of all programs; each field is the flag of that name.

    A program's own class adds those of its task, and may have other defaults.
    """

    PROGRAM: ClassVar[str]  # experiments.PROGRAM trains it
    OPTIMIZERS: ClassVar[tuple[str, ...]]

    workdir: str
    dataset: str = ""
    validation_size: int = 0
    model: str = ""
    num_stages: int = 2
    devices_per_stage: int = 1
    shard_optimizer: bool = False
    message_dtype: str = "float32"
    partition: str = "time"
    method: str = "fdg"
    order: str = "forward_first"
    beta: float = 1.0
    gradient: str = "stale"
    microbatches: int = 4
    accumulate: int | None = None
    reduction: str = "mean"
    optimizer: str = ""
    learning_rate: float = 0.1
    momentum: float = 0.9
    warmup_steps: int = 0
    weight_decay: float = 0.0
    batch_size: int = 1
    epochs: int = 1
    steps: int = 0
    seed: int = 0
    eval_every_epochs: int = 1
    eval_every_steps: int = 0
    log_every_steps: int = 20
    max_ahead: int = 4
    on_nonfinite: str = "stop"
    checkpoint_every_steps: int = 500
    checkpoint_every_minutes: float = 10.0
    keep_checkpoints: int = 3
    timeline: int = 0
    profile: int = 0
    writers: str = ""
    resume: bool = True
    overwrite: bool = False

    def check(self) -> None:
        """Raises `UsageError` for the first invalid value."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers:
                if isinstance(number, float) and not math.isfinite(number):
                    raise UsageError(f"--{field.name}={number}: give a finite number")
                if isinstance(number, str) and not _plain(number):
                    raise UsageError(
                        f"--{field.name}={number!a}: has characters that cannot be shown; give "
                        "plain text"
                    )
        self.one_of("method", tuple(methods.METHODS))
        self.one_of("order", ORDERS)
        self.one_of("gradient", GRADIENTS)
        self.one_of("reduction", REDUCTIONS)
        self.one_of("message_dtype", MESSAGE_DTYPES)
        self.one_of("on_nonfinite", ON_NONFINITE)
        for name in ("num_stages", "batch_size", "epochs", "log_every_steps", "eval_every_epochs"):
            self.bound(name, 1)
        for name in ("max_ahead", "microbatches", "keep_checkpoints", "devices_per_stage"):
            self.bound(name, 1)
        if self.accumulate is not None:
            self.bound("accumulate", 1)
        for name in ("steps", "seed", "validation_size", "eval_every_steps"):
            self.bound(name, 0)
        for name in ("checkpoint_every_steps", "timeline", "profile"):
            self.bound(name, 0)
        remedies.check(self, self.OPTIMIZERS)
        family.check(self)
        writers.check(self.writers)
        if self.checkpoint_every_minutes < 0:
            raise UsageError(
                f"--checkpoint_every_minutes={self.checkpoint_every_minutes:g}: must be 0 or more; "
                "0 takes steps only"
            )
        if not 0 < self.beta <= 1:
            raise UsageError(f"--beta={self.beta}: must lie in (0, 1]; 1 does not shrink")
        if self.learning_rate <= 0:
            raise UsageError(
                f"--learning_rate={self.learning_rate}: must be above 0; try "
                f"{type(self).learning_rate:g}"
            )
        if not 0 <= self.momentum < 1:
            raise UsageError(f"--momentum={self.momentum}: must lie in [0, 1); try 0.9")
        self.bound("warmup_steps", 0)
        if self.weight_decay < 0:
            raise UsageError(
                f"--weight_decay={self.weight_decay}: must be 0 or more; try "
                f"{type(self).weight_decay:g}"
            )
        if not self.workdir:
            raise UsageError("--workdir: is missing; name the folder for the results")
        self.cuts()
        with blame("accumulate"):
            parts = methods.schedule(self).microbatches
        if self.batch_size % parts:
            raise UsageError(
                f"--microbatches={parts}: does not divide --batch_size={self.batch_size}; choose "
                "one that does"
            )

    def cuts(self) -> list[int] | None:
        """The cuts given by ``partition``, or None if it names a cost."""
        if self.partition in ("time", "flops"):
            return None
        if methods.num_stages(self) == 1:
            return []
        such = ",".join(str(3 * k) for k in range(1, self.num_stages)[:9])
        remedy = f"give time, flops, or {self.num_stages - 1} layer numbers such as {such}"
        try:
            cuts = [int(part) for part in self.partition.split(",")] if self.partition else []
        except ValueError:
            raise UsageError(f"--partition={self.partition}: not understood; {remedy}") from None
        if len(cuts) != self.num_stages - 1:
            raise UsageError(
                f"--partition={self.partition}: --num_stages={self.num_stages} needs "
                f"{self.num_stages - 1} cuts, not {len(cuts)}; {remedy}"
            )
        return cuts

    def one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        """Raises `UsageError` unless a setting has one of the allowed values."""
        value = getattr(self, name)
        if value not in allowed:
            raise UsageError(f"--{name}={value}: no such choice; allowed are {', '.join(allowed)}")

    def check_warmup(self, steps: int) -> None:
        """Raises `UsageError` if a run of ``steps`` steps is not longer than the warm-up."""
        if self.warmup_steps >= steps:
            raise UsageError(
                f"--warmup_steps={self.warmup_steps}: must be below the run's {steps} steps; "
                "choose less, or train longer"
            )

    def bound(self, name: str, least: int) -> None:
        """Raises `UsageError` for a number below ``least`` or above int32."""
        value, most = getattr(self, name), 2**31 - 1
        if not least <= value <= most:
            raise UsageError(f"--{name}={value}: must lie in {least}..{most}; choose such a number")


def _plain(text: str) -> bool:
    """Whether a text has no control characters and no invalid UTF-8."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def program_of(described: Mapping[str, Any]) -> Any:
    """The program of the run described by a config.json; default: cifar."""
    return described.get("experiment", "cifar")


@contextlib.contextmanager
def blame(flag: str) -> Iterator[None]:
    """Converts the library's error about an argument to one about its flag."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--{flag}: {error}") from error
