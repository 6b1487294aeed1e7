"""Image classification as a task: images in memory, augmentation, network."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fdg_jax as fdg
from experiments import data
from experiments.common.errors import UsageError
from experiments.images.settings import Settings
from experiments.training import methods, remedies
from experiments.training.config import blame
from experiments.training.setup import AUGMENT_KEY
from experiments.training.task import Task
from fdg_jax.engine.placement import put
from fdg_jax.engine.stage import Stage
from fdg_jax.layer import Layer
from fdg_jax.schedule import Schedule

# Held-out images and subsets of train do not depend on --seed, which only repeats the training.
SPLIT_SEED = 0


class Images(Task[Settings]):
    """Classification of the images of a data set."""

    unit: ClassVar[str] = "images"
    metric: ClassVar[str] = "error"
    images: ClassVar[bool] = True
    size: ClassVar[str] = "model"
    makes: ClassVar[tuple[str, ...]] = ("model", "dropout", "unroll", "dtype", "fast_derivatives")
    described: ClassVar[tuple[str, ...]] = (
        *("dataset", "num_classes", "class_names", "image_shape", "mean", "std"),
    )

    def __init__(self, config: Settings) -> None:
        try:
            self.dataset = data.load(
                config.dataset,
                config.data_dir,
                validation_size=config.validation_size,
                train_size=config.train_size,
                seed=SPLIT_SEED,
            )
        except (OSError, RuntimeError) as error:
            raise UsageError(f"--dataset={config.dataset}: cannot be read ({error})") from error
        self.config = config
        self.name = self.dataset.name
        self.split = "validation" if config.validation_size else "test"
        self.num_classes = self.dataset.num_classes
        self.tie = None
        self._place(self.dataset)
        height, width, channels = self.dataset.image_shape
        if config.crop_padding > max(height, width):
            raise UsageError(
                f"--crop_padding={config.crop_padding}: must not exceed the image, "
                f"{height}x{width}; 4 is usual"
            )
        with blame("model"):
            self.layers = layers(config, self.num_classes, channels)

    def describe(self) -> dict[str, Any]:
        dataset = self.dataset
        return {
            "num_classes": dataset.num_classes,
            "class_names": list(dataset.class_names),
            "image_shape": list(dataset.image_shape),
            "mean": dataset.mean.tolist(),
            "std": dataset.std.tolist(),
        }

    def sizes(self) -> str:
        train, held_out = len(self.dataset.train_labels), len(self.dataset.test_labels)
        return f"{train:,} train, {held_out:,} {self.split} images"

    @staticmethod
    def per_batch(config: Settings) -> int:
        return config.batch_size

    def inputs(self, count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *self.dataset.image_shape), jnp.float32)

    def targets(self, count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count,), jnp.int32)

    def training_inputs(self, first: Stage) -> Callable[[np.ndarray, int], jax.Array]:
        config = self.config
        key = put(jax.random.fold_in(jax.random.key(config.seed), AUGMENT_KEY), first.replicated)
        mean, std = put((self.dataset.mean, self.dataset.std), first.replicated)
        augment = jax.jit(
            functools.partial(data.augment, padding=config.crop_padding, flip=config.flip)
        )

        def made(images: np.ndarray, step: int) -> jax.Array:
            pixels, number = put((images, np.int32(step)), (first.sharded, first.replicated))
            return augment(key, number, pixels, mean, std)

        return made

    def evaluation_inputs(self, first: Stage) -> Callable[[np.ndarray], jax.Array]:
        mean, std = put((self.dataset.mean, self.dataset.std), first.replicated)
        normalise = jax.jit(data.normalise)
        return lambda images: normalise(put(images, first.sharded), mean, std)

    def leave_out_inputs(self) -> None:
        self._place(without_images(self.dataset))

    def held_for_choice(self, wanted: int) -> int:
        config = self.config
        whole = data.load(config.dataset, config.data_dir)
        count, size = len(whole.train_labels), config.train_size
        held = wanted or max(count // 10, 1)
        if held + max(size, 1) > count:
            raise UsageError(
                f"--choose_validation_size={held}: with --train_size={size} these are more than "
                f"the {count} train images; choose fewer"
            )
        return held

    def rate(self, total: int, period: int) -> optax.Schedule:
        per_epoch = self.loader.steps_per_epoch / period
        if self.config.warmup_steps:
            self.config.check_warmup(total)
        rate = learning_rate(self.config, per_epoch, total / period)
        return warmed_up(rate, self.config.warmup_steps / period)

    @staticmethod
    def optimizer(
        config: Settings, rate: optax.Schedule, schedule: Schedule, stage: int
    ) -> optax.GradientTransformation:
        return optimizer(config, rate, schedule, stage)

    @staticmethod
    def network(about: Mapping[str, Any]) -> list[Layer]:
        config = Settings("-", **{name: about[name] for name in Images.makes})
        config.check()
        return layers(config, about["num_classes"], Images.example(about, 1).shape[-1])

    @staticmethod
    def example(about: Mapping[str, Any], count: int) -> jax.ShapeDtypeStruct:
        height, width, channels = about["image_shape"]
        return jax.ShapeDtypeStruct((count, height, width, channels), jnp.float32)

    @staticmethod
    def num_labels(about: Mapping[str, Any]) -> int:
        return int(about["num_classes"])

    def _place(self, dataset: data.Dataset) -> None:
        self.dataset = dataset
        self.held_out = dataset.test_images, dataset.test_labels
        self.loader = data.Loader(
            dataset.train_images,
            dataset.train_labels,
            self.config.batch_size,
            seed=self.config.seed,
        )


def layers(config: Settings, num_classes: int, channels: int) -> list[Layer]:
    """The network named by the settings, input first.

    Raises:
      ValueError: unknown network.
    """
    unroll = {"auto": None, "yes": True, "no": False}[config.unroll]
    how = compute(config.dtype, config.fast_derivatives)
    return fdg.models.create(config.model, num_classes, channels, unroll, how, config.dropout)


def compute(dtype: str, fast_derivatives: bool) -> fdg.models.Compute:
    """Numerical settings of the network, from the flags."""
    return fdg.models.Compute(None if dtype == "float32" else jnp.dtype(dtype), fast_derivatives)


def learning_rate(config: Settings, per_epoch: float, total: float) -> optax.Schedule:
    """The learning rate of a stage by update, from updates per epoch and in total."""
    if config.lr_schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, math.ceil(total))
    if config.lr_schedule == "constant":
        return optax.constant_schedule(config.learning_rate)
    boundaries: dict[int, float] = {}
    for epoch in config.lr_milestones:
        update = round(min(epoch * per_epoch, total))  # those beyond the end have no effect
        boundaries[update] = boundaries.get(update, 1.0) * config.lr_decay
    return optax.piecewise_constant_schedule(config.learning_rate, boundaries)


def warmed_up(rate: optax.Schedule, updates: float) -> optax.Schedule:
    """A learning rate with linear warm-up from 0."""
    if not updates:
        return rate
    return lambda count: rate(count) * jnp.minimum(1.0, count / updates)


def optimizer(
    config: Settings, rate: optax.Schedule, schedule: Schedule, stage: int
) -> optax.GradientTransformation:
    """A stage's optimizer: SGD or Muon, with shrinking and --remedy."""
    own = remedies.StageSettings(
        rate,
        (schedule, stage),
        schedule.period,
        config.momentum,
        config.weight_decay,
        methods.beta(config),
        hops=schedule.num_stages - 1 - stage,
        mask=None if config.decay_norms else remedies.kernels,
        exclude="dense",  # the last layer
        nesterov=config.nesterov,
    )
    return remedies.optimizer(config, own)


def without_images(dataset: data.Dataset) -> data.Dataset:
    """The data set with images that use no memory, for processes without the first stage."""

    def nothing(images: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.uint8(0), images.shape)

    return dataclasses.replace(
        dataset,
        train_images=nothing(dataset.train_images),
        test_images=nothing(dataset.test_images),
    )
