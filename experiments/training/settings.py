"""The settings of a run as flags: what each is for, and which `Config` they say."""

from __future__ import annotations

from absl import flags

from experiments.common import fields
from experiments.common.errors import UsageError
from experiments.training import config, family, methods, remedies, writers
from experiments.training.config import Config

HELP = {
    **family.HELP,
    **remedies.help_texts(config.OPTIMIZERS),
    "workdir": "Folder for config.json, metrics.jsonl, summary.json, curves.png and checkpoints.",
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
    "unroll": f"Equal blocks written out, or compiled once and scanned: {config.UNROLL}. auto "
    "scans on GPU and TPU only.",
    "dtype": f"Of activations and their gradients, one of {config.DTYPES}; parameters are float32.",
    "fast_derivatives": "Whether convolution, batch norm and ReLU use the models' own derivatives, "
    "which are faster on CPU and keep fewer bytes.",
    "num_stages": "K: the number of modules that the network is split into.",
    "devices_per_stage": "Devices that share every mini-batch of a stage, as many parts of it.",
    "shard_optimizer": "Whether a stage's devices share its optimizer's state out among them, "
    "where they would each keep all of it.",
    "message_dtype": "Of activations and gradients between stages, one of "
    f"{config.MESSAGE_DTYPES}; float32 sends them as they are.",
    "partition": "How to split: by time, measured once and kept in the cache; by flops, which "
    "repeats everywhere; or at the layer numbers given, such as 3,5.",
    "method": f"One of {', '.join(methods.METHODS)}.",
    "order": "What a stage of fdg, dsp, adl, petra and paci does first in a tick: one of "
    f"{config.ORDERS}.",
    "beta": "Gradient shrinking factor in (0, 1]; 1 does not shrink.",
    "gradient": "Gradient rule: which weights a delayed backward uses, and what is kept for it; "
    f"one of {config.GRADIENTS}; fr, dsp, petra, paci and pipemare have their own.",
    "microbatches": "Micro-batches per mini-batch in gpipe, one_f_one_b and zero_bubble.",
    "accumulate": "Backwards per update in adl, paci (default 2), petra (1) and pipedream_2bw (K).",
    "reduction": f"What adl applies of the accumulated gradients: one of {config.REDUCTIONS}.",
    "lr_schedule": f"One of {config.LR_SCHEDULES}.",
    "lr_milestones": "Epochs after which the rate is multiplied by lr_decay, with "
    "lr_schedule=milestones.",
    "lr_decay": "Factor at each milestone.",
    "momentum": "Of SGD and Muon, and of Adam beside Muon.",
    "weight_decay": "On every parameter; with muon decoupled from the gradient.",
    "batch_size": "Images a mini-batch.",
    "epochs": "Passes over the train split.",
    "steps": "Mini-batches in all; overrides epochs unless 0.",
    "seed": "Of initial weights, order of images, augmentation and dropout.",
    "eval_every_epochs": "Epochs between evaluations.",
    "log_every_steps": "Steps between lines of metrics.jsonl.",
    "max_ahead": "Ticks that the host may be ahead of the devices.",
    "on_nonfinite": "What becomes of a mini-batch whose loss or gradient is NaN or infinite: stop "
    "ends the run, with status 1, and names it; skip leaves it out in the stage concerned.",
    "checkpoint_every_steps": "Steps between checkpoints of the run, in the workdir, beside one "
    "after every evaluation with the lowest error so far; 0: none.",
    "checkpoint_every_minutes": "A checkpoint also after so many minutes without one; 0: none.",
    "keep_checkpoints": "How many of the newest checkpoints stay, beside the one with the lowest "
    "evaluated error.",
    "timeline": "Ticks of which is recorded what ran when, as soon as all programs have been "
    "compiled: timeline.json (for Perfetto) and timeline.png; 0: none.",
    "profile": "Ticks after those that JAX's profiler traces, into the workdir's folder profile, "
    "for TensorBoard or XProf; 0: none.",
    "writers": f"Where metrics go beside metrics.jsonl: any of {', '.join(writers.WRITERS)}, with "
    "commas. wandb is offline unless WANDB_MODE says otherwise.",
    "resume": "Whether an unfinished run in the workdir goes on from its newest good checkpoint, "
    "as if it had never stopped; --noresume refuses a workdir that holds a run.",
    "overwrite": "Whether an earlier run in the workdir is replaced, finished or not.",
}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """One flag for every field of `Config`, with its default."""
    fields.define(Config, HELP, values)


def from_flags(parsed: flags.FlagValues = flags.FLAGS) -> Config:
    """The settings that the flags say.

    Raises:
      UsageError: a list has an entry that is no number.
    """
    values = fields.given(Config, parsed)
    milestones = values["lr_milestones"]
    try:
        values["lr_milestones"] = tuple(float(v) for v in milestones)
    except ValueError:
        given = ",".join(milestones)
        raise UsageError(f"--lr_milestones={given}: give epochs, such as 150,225,275") from None
    return Config(**values)
