"""What a run of experiments.lm is: every setting, its flag, and what is allowed."""

from __future__ import annotations

import dataclasses
import math

from absl import flags

from experiments.common import fields
from experiments.common.errors import UsageError
from experiments.training import family, methods, remedies
from experiments.training.config import GRADIENTS, MESSAGE_DTYPES, ORDERS, REDUCTIONS, blame

OPTIMIZERS = ("adamw", "muon")
HELP = {
    **remedies.help_texts(OPTIMIZERS),
    **family.HELP,
    "workdir": "Folder for config.json, metrics.jsonl, summary.json and curves.png.",
    "text": "A file of any bytes; without it the documentation of the standard library is taken.",
    "validation_fraction": "Share of the text, at its end, that is held out.",
    "width": "Of a byte's vector; the hidden layers are four times as wide.",
    "blocks": "Blocks of the transformer; with embedding and head, 2 more layers to cut between.",
    "heads": "Of each block's attention.",
    "reversible": "Whether the blocks can be inverted: attention and perceptron on two streams.",
    "tie_embedding": "Whether the head uses the embedding's table (fdg_jax.tie).",
    "context": "Bytes of a sequence.",
    "num_stages": "K: the number of modules that the network is split into, by FLOPs.",
    "method": f"One of {', '.join(methods.METHODS)}.",
    "order": f"What a stage of fdg, dsp and adl does first in a tick: one of {ORDERS}.",
    "beta": "Factor on a stage's updates for every hop to the loss, in (0, 1]; 1 does not shrink.",
    "gradient": f"What a delayed backward takes: one of {GRADIENTS}; fr and dsp have their own.",
    "message_dtype": f"Of activations and gradients between stages, one of {MESSAGE_DTYPES}; "
    "float32 sends them as they are.",
    "microbatches": "Parts of a mini-batch in gpipe and one_f_one_b.",
    "accumulate": "Backwards per update in adl (default 2) and pipedream_2bw (default K).",
    "reduction": f"What adl applies of the accumulated gradients: one of {REDUCTIONS}.",
    "learning_rate": "After the warm-up; it then falls to 0 along a cosine.",
    "warmup_steps": "Steps in which the rate rises from 0, fewer than --steps.",
    "b1": "Decay of AdamW's first moment, and Muon's momentum, in [0, 1).",
    "weight_decay": "Of the matrices of dense layers.",
    "clip_norm": "The gradient's norm at most; a stage takes its share, clip_norm / sqrt(K).",
    "batch_size": "Sequences a mini-batch.",
    "steps": "Mini-batches in all.",
    "seed": "Of initial weights and of the places that sequences are taken from.",
    "eval_every_steps": "Steps between evaluations.",
    "log_every_steps": "Steps between lines of metrics.jsonl.",
    "max_ahead": "Ticks that the host may be ahead of the devices.",
    "overwrite": "Whether an earlier run in the workdir is replaced.",
}


@dataclasses.dataclass(frozen=True)
class Settings(remedies.Remedies, family.Family):
    """The settings of one run; each field is the flag of that name."""

    workdir: str
    text: str | None = None
    validation_fraction: float = 0.1
    width: int = 64
    blocks: int = 4
    heads: int = 4
    reversible: bool = False
    tie_embedding: bool = False
    context: int = 64
    num_stages: int = 2
    method: str = "fdg"
    order: str = "forward_first"
    beta: float = 1.0
    gradient: str = "stale"
    message_dtype: str = "float32"
    microbatches: int = 4
    accumulate: int | None = None
    reduction: str = "mean"
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    b1: float = 0.9
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    batch_size: int = 16
    steps: int = 1500
    seed: int = 0
    eval_every_steps: int = 250
    log_every_steps: int = 20
    max_ahead: int = 4
    overwrite: bool = False

    def check(self) -> None:
        """Raises `UsageError` for the first value that is not allowed."""
        if not self.workdir:
            raise UsageError("--workdir: is missing; name the folder for the results")
        choices = {
            "method": tuple(methods.METHODS),
            "order": ORDERS,
            "gradient": GRADIENTS,
            "message_dtype": MESSAGE_DTYPES,
            "reduction": REDUCTIONS,
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise UsageError(
                    f"--{name}={value}: no such choice; allowed are {', '.join(allowed)}"
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("seed", "warmup_steps", "rate_anneal_steps") else 1
            if type(value) is int and not least <= value < 2**31:
                raise UsageError(
                    f"--{field.name}={value}: must lie in {least}..{2**31 - 1}; choose such a "
                    "number"
                )
            if type(value) is float and not (0 <= value < math.inf):
                raise UsageError(f"--{field.name}={value}: must be finite, and 0 or more")
        remedies.check(self, OPTIMIZERS)
        family.check(self)
        for name in ("learning_rate", "clip_norm"):
            if getattr(self, name) == 0:
                raise UsageError(f"--{name}=0: must be above 0; try {getattr(Settings, name):g}")
        if not 0 < self.beta <= 1:
            raise UsageError(f"--beta={self.beta}: must lie in (0, 1]; 1 does not shrink")
        if not self.b1 < 1:
            raise UsageError(f"--b1={self.b1}: must lie in [0, 1); try {Settings.b1:g}")
        if not 0 < self.validation_fraction < 1:
            raise UsageError(
                f"--validation_fraction={self.validation_fraction}: must lie in (0, 1); try 0.1"
            )
        if self.width % self.heads:
            raise UsageError(
                f"--heads={self.heads}: does not divide --width={self.width}; choose one that does"
            )
        if self.warmup_steps >= self.steps:
            raise UsageError(
                f"--warmup_steps={self.warmup_steps}: must be below --steps={self.steps}"
            )
        if methods.num_stages(self) > self.blocks + 2:
            raise UsageError(
                f"--num_stages={self.num_stages}: a transformer of --blocks={self.blocks} has "
                f"{self.blocks + 2} layers that can be split; choose 1 to {self.blocks + 2}"
            )
        method = methods.METHODS[self.method]
        if self.tie_embedding and (method.beside or methods.gradient(self) == "reversible"):
            raise UsageError(
                f"--tie_embedding: --method={self.method} sends the head's gradient to no other "
                "stage, or takes the network apart; choose another method"
            )
        with blame("accumulate"):
            schedule = methods.schedule(self)
        if self.batch_size % schedule.microbatches:
            raise UsageError(
                f"--microbatches={schedule.microbatches}: does not divide "
                f"--batch_size={self.batch_size}; choose one that does"
            )
        if schedule.period > self.steps:
            raise UsageError(
                f"--accumulate={schedule.period}: must not exceed --steps={self.steps}"
            )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """One flag for every field of `Settings`, with its default."""
    fields.define(Settings, HELP, values)


def from_flags(parsed: flags.FlagValues = flags.FLAGS) -> Settings:
    """The settings that the flags say."""
    return Settings(**fields.given(Settings, parsed))
