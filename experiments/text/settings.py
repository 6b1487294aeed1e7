"""Settings of experiments.lm, with flags and allowed values."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from absl import flags

from experiments.common import fields
from experiments.common.errors import UsageError
from experiments.training import methods
from experiments.training.config import Config
from experiments.training.settings import help_texts

OPTIMIZERS = ("adamw", "muon")
MODELS = ("transformer", "reversible_transformer")

HELP = {
    **help_texts("Sequences", OPTIMIZERS),
    "dataset": "file:PATH, of any bytes; or python_docs, the documentation of the standard library "
    "as it is installed.",
    "validation_size": "Bytes at the end of the text that are held out; 0 takes a tenth.",
    "model": f"One of {', '.join(MODELS)}. The second has two streams, and blocks that can be "
    "inverted.",
    "width": "Of a byte's vector; the hidden layers are four times as wide.",
    "blocks": "Blocks of the transformer; with embedding and head, 2 more layers to cut between.",
    "heads": "Of each block's attention.",
    "tie_embedding": "Whether the head uses the embedding's table (fdg_jax.tie).",
    "context": "Bytes of a sequence.",
    "beta": "Factor on a stage's updates for every hop to the loss, in (0, 1]; 1 does not shrink.",
    "learning_rate": "After the warm-up; it then falls to 0 along a cosine.",
    "momentum": "Of Muon, and the decay of Adam's first moment (b1), in [0, 1).",
    "weight_decay": "Of the matrices of dense layers, decoupled from the gradient.",
    "clip_norm": "The gradient's norm at most; a stage takes its share, clip_norm / sqrt(K).",
    "epochs": "Mini-batches in all, as passes over so many bytes as the text for training has.",
    "seed": "Of initial weights and of the places that sequences are taken from.",
}


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """The settings of one run; each field is the flag of that name."""

    PROGRAM: ClassVar[str] = "lm"
    OPTIMIZERS: ClassVar[tuple[str, ...]] = OPTIMIZERS

    dataset: str = "python_docs"
    model: str = "transformer"
    width: int = 64
    blocks: int = 4
    heads: int = 4
    tie_embedding: bool = False
    context: int = 64
    partition: str = "flops"
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    batch_size: int = 16
    epochs: int = 3
    steps: int = 1500
    eval_every_steps: int = 250

    def check(self) -> None:
        """Raises `UsageError` for the first invalid value."""
        super().check()
        self.one_of("model", MODELS)
        for name in ("width", "blocks", "heads", "context"):
            self.bound(name, 1)
        if self.clip_norm <= 0:
            raise UsageError(f"--clip_norm={self.clip_norm}: must be above 0; try 1")
        if self.width % self.heads:
            raise UsageError(
                f"--heads={self.heads}: does not divide --width={self.width}; choose one that does"
            )
        method = methods.METHODS[self.method]
        if self.tie_embedding and (method.beside or methods.gradient(self) == "reversible"):
            raise UsageError(
                f"--tie_embedding: --method={self.method} sends the head's gradient to no other "
                "stage, or takes the network apart; choose another method"
            )
        if self.steps:
            self.check_warmup(self.steps)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one flag per field of `Settings`, with its default."""
    fields.define(Settings, HELP, values)


def from_flags(parsed: flags.FlagValues = flags.FLAGS) -> Settings:
    """The settings given by the flags."""
    return Settings(**fields.given(Settings, parsed))
