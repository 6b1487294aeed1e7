"""Settings of trainings, and the times of their kills."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

METHODS = ("fdg", "adl", "gpipe")
GRADIENTS = ("stale", "recompute_stale", "recompute")
MODEL = "wrn10_1"
# Methods in which stage 0 trains on a mini-batch in the tick in which it enters.
UNDELAYED = ("gpipe", "dgl", "dni")
# Maximum seconds from the awaited moment to a kill from outside.
LATEST = 0.1

# Moments of watched.py, with the number of the pass.
CONFIG = ["write config.json:1", "wrote config.json:1"]
LINES = ["line:3", "line written:3"]
EVALUATIONS = ["evaluation:1", "predict:2", "evaluated:1"]
SAVES = [
    "copies:1",
    "array file:2",
    "array file:5",
    "arrays written:1",
    "manifest written:2",
    "renamed:1",
    "removed:2",
]
RESTORES = ["restore:1", "restored:1", "write metrics.jsonl:1", "wrote metrics.jsonl:1"]
DRAINS = ["drain:1", "drained:1", "drain tick:1", "drain tick:2"]
ENDS = [
    "last copies:1",
    "last removed:1",
    "write curves.png:1",
    "write summary.json:1",
    "wrote summary.json:1",
]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of a training."""

    method: str
    gradient: str
    num_stages: int
    optimizer: str = "sgd"
    remedy: str = "none"
    model: str = MODEL
    message_dtype: str = "float32"
    program: str = "cifar"

    @property
    def extras(self) -> list[str]:
        """The differences from most settings, as parts of its name."""
        remedy = [] if self.remedy == "none" else [self.optimizer, self.remedy]
        model = [] if self.model == MODEL else [self.model]
        messages = [] if self.message_dtype == "float32" else [self.message_dtype]
        return [*remedy, *model, *messages]

    @property
    def name(self) -> str:
        return "-".join([self.method, self.gradient, str(self.num_stages), *self.extras])

    @property
    def fill(self) -> int:
        """Ticks before stage 0 applies its first true gradient, the schedule's delay."""
        return 0 if self.method in UNDELAYED else 2 * (self.num_stages - 1)

    @property
    def in_flight(self) -> bool:
        """Whether mini-batches are in flight between steps, so that the drain has ticks."""
        return self.method != "gpipe" and self.num_stages > 1

    @property
    def flags(self) -> list[str]:
        """30 steps of a small network; a checkpoint falls into the fill of K = 3 and 4."""
        return [*self._common, *(self._images if self.program == "cifar" else self._text)]

    @property
    def _images(self) -> list[str]:
        k = self.num_stages
        # The usual model has five layers; the reversible one has more, and no dropout.
        usual = self.model == MODEL
        partition = ("flops", "2", "2,3", "1,2,3")[k - 1] if usual else "flops"
        return [
            f"--model={self.model}",
            f"--dropout={0.2 if usual else 0}",
            "--crop_padding=1",
            "--flip",
            "--learning_rate=0.05",
            "--lr_milestones=2,4",
            f"--partition={partition}",
            "--eval_every_epochs=2",
        ]

    @property
    def _text(self) -> list[str]:
        """A network of four layers, with three evaluations."""
        return [
            f"--model={self.model}",
            "--width=8",
            "--blocks=2",
            "--heads=2",
            "--context=8",
            "--tie_embedding",
            "--learning_rate=0.01",
            "--warmup_steps=5",
            "--partition=flops",
            "--eval_every_steps=10",
        ]

    @property
    def _common(self) -> list[str]:
        k = self.num_stages
        return [
            "--momentum=0.9",
            "--beta=0.7",
            f"--method={self.method}",
            f"--gradient={self.gradient}",
            f"--num_stages={k}",
            f"--message_dtype={self.message_dtype}",
            "--synthesizer_width=8",
            # Turns of four mini-batches, so that checkpoints every 3 cover all positions of a turn.
            "--phases=3:1",
            f"--optimizer={self.optimizer}",
            f"--remedy={self.remedy}",
            f"--rate_anneal_steps={0 if self.remedy == 'none' else 20}",
            f"--order={('forward_first', 'backward_first')[k % 2]}",
            f"--accumulate={max(k, 2)}",
            "--microbatches=2",
            "--batch_size=8",
            "--steps=30",
            "--log_every_steps=3",
            f"--checkpoint_every_steps={3 if k == 3 else 5}",
        ]


# Every method with every gradient rule and every K.
SETTINGS = [
    Setting(method, GRADIENTS[(i + k) % 3], k)
    for i, method in enumerate(METHODS)
    for k in (1, 2, 3, 4)
]
# Every remedy, each with its own state.
SETTINGS += [
    Setting("fdg", "stale", 3, "sgd", "prediction"),
    Setting("fdg", "recompute", 3, "sgd", "spike"),
    Setting("fdg", "stale", 3, "sgd", "error_feedback"),
    Setting("fdg", "recompute_stale", 4, "sgd", "recipe"),
    Setting("adl", "stale", 3, "muon", "recipe"),
    Setting("fdg", "stale", 4, "muon", "error_feedback"),
]
# Settings with additional contents of checkpoints: streams without residuals, heads, synthesizers,
# earlier weights, encoded messages.
SETTINGS += [
    Setting("petra", "reversible", 4, model="small_revnet"),
    Setting("dgl", "stale", 3),
    Setting("dni", "stale", 4),
    Setting("dni_late", "stale", 3),
    Setting("fdg", "reconstruct", 3),
    Setting("fdg", "stale", 3, message_dtype="int8"),
]
# A language model with a tied array.
SETTINGS += [
    Setting("fdg", "stale", 3, "adamw", "recipe", model="transformer", program="lm"),
]


@dataclasses.dataclass(frozen=True)
class Order:
    """The time at which a process is killed.

    Attributes:
      moment: a moment of watched.py, with a number; empty: killed from outside.
      lines: number of log lines awaited before a kill from outside.
      seconds: delay after those lines.
    """

    moment: str = ""
    lines: int = 0
    seconds: float = 0.0


def plan(setting: Setting, share: int, rng: random.Random) -> list[Order]:
    """``share`` kills of as many kinds as possible, in the order of a run."""
    place = SETTINGS.index(setting)

    def turn(moments: Sequence[str], number: int = place) -> Order:
        """Settings take turns, so that together they cover all moments of a kind."""
        return Order(moments[number % len(moments)])

    def outside(lines: int) -> Order:
        return Order(lines=rng.randint(1, lines), seconds=rng.uniform(0, LATEST))

    steady = [f"steady:{n}" for n in range(1, 9)]
    fill = [f"fill:{n + 1}" for n in range(setting.fill)]
    # Each with its position in a run; equal positions come in any order.
    kinds = [
        (1, Order(rng.choice(fill or steady))),
        (0, turn(CONFIG)),
        (2, Order("saved:1")),
        (3, turn(SAVES, 2 * place)),
        (3, turn(SAVES, 2 * place + 1)),
        (3, turn(EVALUATIONS)),
        (3, Order(rng.choice(steady + LINES))),
        (3, outside(60)),
        (4, turn(RESTORES)),
        (5, turn(DRAINS if setting.in_flight else DRAINS[:2], place + place // 4)),
        (6, turn(ENDS, place + place // 4)),
    ]
    # A run may end before these; they are then repeated in another one.
    kinds += [(4, outside(150)) for _ in range(share - len(kinds))]
    # With a smaller share, settings have different kinds, but always the fill if there is one.
    kinds = [kinds[0], *rng.sample(kinds[1:], len(kinds) - 1)][:share]
    return [order for _, order in sorted(rng.sample(kinds, share), key=lambda pair: pair[0])]
