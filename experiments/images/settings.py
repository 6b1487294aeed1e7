"""Settings of experiments.cifar, with flags and allowed values."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from absl import flags

from experiments.common import fields
from experiments.common.errors import UsageError
from experiments.training.config import Config
from experiments.training.settings import help_texts

OPTIMIZERS = ("sgd", "muon")
LR_SCHEDULES = ("milestones", "cosine", "constant")
UNROLL = ("auto", "yes", "no")
DTYPES = ("float32", "bfloat16")

HELP = {
    **help_texts("Images", OPTIMIZERS),
    "dataset": "fashion_mnist_small, cifar10, cifar100, tfds:NAME, or folder:PATH with "
    "train/<class>/* and test/<class>/* (PNG, JPEG).",
    "data_dir": "Where prepared data sets and archives are, and where they are put.",
    "validation_size": "Images held out of train; errors are then measured on them instead of on "
    "the test split, and summary.json has validation_error in place of test_error. For choosing "
    "beta.",
    "train_size": "Size of a fixed, class-balanced subset of train; 0 takes all.",
    "crop_padding": "Pixels of black border for random crops; 0 switches crops off.",
    "flip": "Whether to mirror half of the train images.",
    "model": "small_resnet; resnet20, 32, 44, 56, 110, 1202; resnet18, 34, 50, 101; plain16; "
    "wrn28_10 or any other wrn<6n+4>_<k>; reversible: small_revnet, revnet18, 34, 50.",
    "dropout": "Rate in the blocks of a wide ResNet, in [0, 1); the other models have none.",
    "unroll": f"Equal blocks written out, or compiled once and scanned: {UNROLL}. auto "
    "scans on GPU and TPU only.",
    "dtype": f"Of activations and their gradients, one of {DTYPES}; parameters are float32.",
    "fast_derivatives": "Whether convolution, batch norm and ReLU use the models' own derivatives, "
    "which are faster on CPU and keep fewer bytes.",
    "lr_schedule": f"One of {LR_SCHEDULES}.",
    "lr_milestones": "Epochs after which the rate is multiplied by lr_decay, with "
    "lr_schedule=milestones.",
    "lr_decay": "Factor at each milestone.",
    "momentum": "Of SGD and Muon, and of Adam beside Muon.",
    "nesterov": "Whether SGD's momentum is Nesterov's; with --remedy=none or error_feedback.",
    "weight_decay": "With sgd added to the gradient, with muon decoupled from it.",
    "decay_norms": "Whether scales and biases decay as well; without, --remedy is none or "
    "error_feedback with sgd.",
    "seed": "Of initial weights, order of images, augmentation and dropout.",
}


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """The settings of one run; each field is the flag of that name."""

    PROGRAM: ClassVar[str] = "cifar"
    OPTIMIZERS: ClassVar[tuple[str, ...]] = OPTIMIZERS

    dataset: str = "fashion_mnist_small"
    data_dir: str | None = None
    train_size: int = 0
    crop_padding: int = 4
    flip: bool = True
    model: str = "small_resnet"
    dropout: float = 0.0
    unroll: str = "auto"
    dtype: str = "float32"
    fast_derivatives: bool = True
    optimizer: str = "sgd"
    lr_schedule: str = "milestones"
    lr_milestones: tuple[float, ...] = (150.0, 225.0, 275.0)
    lr_decay: float = 0.1
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norms: bool = True
    batch_size: int = 128
    epochs: int = 300

    def check(self) -> None:
        """Raises `UsageError` for the first invalid value."""
        super().check()
        self.one_of("lr_schedule", LR_SCHEDULES)
        self.one_of("unroll", UNROLL)
        self.one_of("dtype", DTYPES)
        for name in ("train_size", "crop_padding"):
            self.bound(name, 0)
        plain = self.remedy in ("none", "error_feedback")
        if self.nesterov and not (self.optimizer == "sgd" and plain):
            raise UsageError(
                f"--nesterov: not with --optimizer={self.optimizer} --remedy={self.remedy}; take "
                "sgd with --remedy=none or error_feedback"
            )
        if not self.decay_norms and self.optimizer == "sgd" and not plain:
            raise UsageError(
                f"--nodecay_norms: not with --optimizer=sgd --remedy={self.remedy}; take "
                "--remedy=none or error_feedback, or --optimizer=muon"
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout={self.dropout}: must lie in [0, 1); 0 switches it off")
        if not 0 < self.lr_decay <= 1:
            raise UsageError(f"--lr_decay={self.lr_decay}: must lie in (0, 1]; try 0.1")
        if any(
            a >= b for a, b in zip((0.0, *self.lr_milestones), self.lr_milestones, strict=False)
        ):
            values = ",".join(f"{m:g}" for m in self.lr_milestones)
            raise UsageError(f"--lr_milestones={values}: must be epochs above 0 that rise")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one flag per field of `Settings`, with its default."""
    fields.define(Settings, HELP, values)


def from_flags(parsed: flags.FlagValues = flags.FLAGS) -> Settings:
    """The settings given by the flags.

    Raises:
      UsageError: a list has an entry that is not a number.
    """
    values = fields.given(Settings, parsed)
    milestones = values["lr_milestones"]
    try:
        values["lr_milestones"] = tuple(float(v) for v in milestones)
    except ValueError:
        given = ",".join(milestones)
        raise UsageError(f"--lr_milestones={given}: give epochs, such as 150,225,275") from None
    return Settings(**values)
