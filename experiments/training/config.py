"""What a run is: every setting, checked before anything is done."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import unicodedata
from collections.abc import Iterator
from typing import Any

from experiments.common.errors import UsageError
from experiments.training import family, methods, remedies, writers
from fdg_jax.engine.rules import RULES

LR_SCHEDULES = ("milestones", "cosine", "constant")
OPTIMIZERS = ("sgd", "muon")
ORDERS = ("forward_first", "backward_first")
GRADIENTS = tuple(RULES)
REDUCTIONS = ("mean", "sum")
UNROLL = ("auto", "yes", "no")
DTYPES = ("float32", "bfloat16")
MESSAGE_DTYPES = ("float32", "bfloat16", "int8")
ON_NONFINITE = ("stop", "skip")
# Settings that a run may go on with changed: while all is well they move nothing but files.
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
    """The settings of one training run; each field is the flag of that name."""

    workdir: str
    dataset: str = "fashion_mnist_small"
    data_dir: str | None = None
    validation_size: int = 0
    train_size: int = 0
    crop_padding: int = 4
    flip: bool = True
    model: str = "small_resnet"
    dropout: float = 0.0
    unroll: str = "auto"
    dtype: str = "float32"
    fast_derivatives: bool = True
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
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    lr_schedule: str = "milestones"
    lr_milestones: tuple[float, ...] = (150.0, 225.0, 275.0)
    lr_decay: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    epochs: int = 300
    steps: int = 0
    seed: int = 0
    eval_every_epochs: int = 1
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
        """Raises `UsageError` for the first value that is not allowed."""
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
        self._one_of("method", tuple(methods.METHODS))
        self._one_of("order", ORDERS)
        self._one_of("gradient", GRADIENTS)
        self._one_of("reduction", REDUCTIONS)
        self._one_of("lr_schedule", LR_SCHEDULES)
        self._one_of("unroll", UNROLL)
        self._one_of("dtype", DTYPES)
        self._one_of("message_dtype", MESSAGE_DTYPES)
        self._one_of("on_nonfinite", ON_NONFINITE)
        for name in ("num_stages", "batch_size", "epochs", "log_every_steps", "eval_every_epochs"):
            self._bound(name, 1)
        for name in ("max_ahead", "microbatches", "keep_checkpoints", "devices_per_stage"):
            self._bound(name, 1)
        if self.accumulate is not None:
            self._bound("accumulate", 1)
        for name in ("steps", "seed", "validation_size", "train_size", "crop_padding"):
            self._bound(name, 0)
        for name in ("checkpoint_every_steps", "timeline", "profile"):
            self._bound(name, 0)
        remedies.check(self, OPTIMIZERS)
        family.check(self)
        writers.check(self.writers)
        if self.checkpoint_every_minutes < 0:
            raise UsageError(
                f"--checkpoint_every_minutes={self.checkpoint_every_minutes:g}: must be 0 or more; "
                "0 takes steps only"
            )
        if not 0 < self.beta <= 1:
            raise UsageError(f"--beta={self.beta}: must lie in (0, 1]; 1 does not shrink")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout={self.dropout}: must lie in [0, 1); 0 switches it off")
        if self.learning_rate <= 0:
            raise UsageError(f"--learning_rate={self.learning_rate}: must be above 0; try 0.1")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"--momentum={self.momentum}: must lie in [0, 1); try 0.9")
        if self.weight_decay < 0:
            raise UsageError(f"--weight_decay={self.weight_decay}: must be 0 or more; try 0.0005")
        if not 0 < self.lr_decay <= 1:
            raise UsageError(f"--lr_decay={self.lr_decay}: must lie in (0, 1]; try 0.1")
        if any(
            a >= b for a, b in zip((0.0, *self.lr_milestones), self.lr_milestones, strict=False)
        ):
            values = ",".join(f"{m:g}" for m in self.lr_milestones)
            raise UsageError(f"--lr_milestones={values}: must be epochs above 0 that rise")
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
        """The cuts that ``partition`` spells out, or None where it names a cost."""
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

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise UsageError(f"--{name}={value}: no such choice; allowed are {', '.join(allowed)}")

    def _bound(self, name: str, least: int) -> None:
        value, most = getattr(self, name), 2**31 - 1
        if not least <= value <= most:
            raise UsageError(f"--{name}={value}: must lie in {least}..{most}; choose such a number")


def _plain(text: str) -> bool:
    """Whether a text has neither control characters nor bytes that were no UTF-8."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def check_experiment(described: dict[str, Any]) -> None:
    """Raises `ValueError` where a run's config.json is that of another program."""
    if (name := described.get("experiment", "cifar")) != "cifar":
        raise ValueError(f"it is a run of experiments.{name}, and not of experiments.cifar")


@contextlib.contextmanager
def blame(flag: str) -> Iterator[None]:
    """Turns the library's complaint about an argument into one about the flag it came from."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--{flag}: {error}") from error
