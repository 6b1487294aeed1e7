"""What is trained, and when it is killed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

METHODS = ("fdg", "adl", "gpipe")
GRADIENTS = ("stale", "recompute_stale", "recompute")
# A kill from outside comes at most so many seconds after the moment that is awaited.
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
    """What is trained."""

    method: str
    gradient: str
    num_stages: int
    optimizer: str = "sgd"
    remedy: str = "none"

    @property
    def name(self) -> str:
        remedy = "" if self.remedy == "none" else f"-{self.optimizer}-{self.remedy}"
        return f"{self.method}-{self.gradient}-{self.num_stages}{remedy}"

    @property
    def fill(self) -> int:
        """Ticks before stage 0 applies its first gradient."""
        return 0 if self.method == "gpipe" else 2 * (self.num_stages - 1)

    @property
    def flags(self) -> list[str]:
        """30 steps of a network of five layers; a checkpoint falls into the fill of K = 3 and 4."""
        k = self.num_stages
        return [
            "--model=wrn10_1",
            "--dropout=0.2",
            "--crop_padding=1",
            "--flip",
            "--momentum=0.9",
            "--learning_rate=0.05",
            "--lr_milestones=2,4",
            "--beta=0.7",
            f"--method={self.method}",
            f"--gradient={self.gradient}",
            f"--num_stages={k}",
            f"--partition={('flops', '2', '2,3', '1,2,3')[k - 1]}",
            f"--optimizer={self.optimizer}",
            f"--remedy={self.remedy}",
            f"--rate_anneal_steps={0 if self.remedy == 'none' else 20}",
            f"--order={('forward_first', 'backward_first')[k % 2]}",
            f"--accumulate={max(k, 2)}",
            "--microbatches=2",
            "--batch_size=8",
            "--steps=30",
            "--eval_every_epochs=2",
            "--log_every_steps=3",
            f"--checkpoint_every_steps={3 if k == 3 else 5}",
        ]


# Every method meets every gradient and every K.
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


@dataclasses.dataclass(frozen=True)
class Order:
    """When a process is to be killed.

    Attributes:
      moment: of watched.py, with a number; empty: from outside.
      lines: of its log, that are awaited before a kill from outside.
      seconds: that pass after those.
    """

    moment: str = ""
    lines: int = 0
    seconds: float = 0.0


def plan(setting: Setting, share: int, rng: random.Random) -> list[Order]:
    """``share`` moments to be killed at, of as many kinds as can be, in the order of a run."""
    place = SETTINGS.index(setting)

    def turn(moments: Sequence[str], number: int = place) -> Order:
        """Settings take turns, so that together they come to all moments of a kind."""
        return Order(moments[number % len(moments)])

    def outside(lines: int) -> Order:
        return Order(lines=rng.randint(1, lines), seconds=rng.uniform(0, LATEST))

    steady = [f"steady:{n}" for n in range(1, 9)]
    fill = [f"fill:{n + 1}" for n in range(setting.fill)]
    # With its place in a run; what has the same place comes in any order.
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
        (5, turn(DRAINS if fill else DRAINS[:2], place + place // 4)),
        (6, turn(ENDS, place + place // 4)),
    ]
    # These may find a run at its end; then they wait for another one.
    kinds += [(4, outside(150)) for _ in range(share - len(kinds))]
    # A smaller share is other kinds in other settings, but always the fill where there is one.
    kinds = [kinds[0], *rng.sample(kinds[1:], len(kinds) - 1)][:share]
    return [order for _, order in sorted(rng.sample(kinds, share), key=lambda pair: pair[0])]
