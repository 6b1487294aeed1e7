"""Language modelling as a task: bytes of a text, predicted by a transformer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fdg_jax as fdg
from experiments.text import corpus
from experiments.text.settings import Settings
from experiments.text.transformer import reversible_transformer, transformer
from experiments.training import methods, remedies
from experiments.training.task import Task
from fdg_jax.engine.placement import put
from fdg_jax.engine.stage import Stage
from fdg_jax.layer import Layer
from fdg_jax.schedule import Schedule
from fdg_jax.tie import Tie


class Text(Task[Settings]):
    """Next-byte prediction by a transformer; losses are in nats per byte."""

    unit: ClassVar[str] = "bytes"
    metric: ClassVar[str] = "loss"
    images: ClassVar[bool] = False
    size: ClassVar[str] = "width"
    makes: ClassVar[tuple[str, ...]] = (
        *("model", "width", "blocks", "heads", "tie_embedding", "context"),
    )
    described: ClassVar[tuple[str, ...]] = ("dataset", "vocabulary")

    def __init__(self, config: Settings) -> None:
        self.config = config
        self.text = corpus.load(config.dataset, config.validation_size, config.context)
        self.name, self.split = self.text.name, "validation"
        self.loader = corpus.Sequences(self.text, config.context, config.batch_size, config.seed)
        self.held_out = corpus.windows(self.text.validation, config.context)
        self.num_classes = len(self.text.vocabulary)
        self.layers = layers(config, self.num_classes)
        self.tie = tied(config, self.layers)

    def describe(self) -> dict[str, Any]:
        return {
            "text_sha256": self.text.sha256,
            "train_bytes": len(self.text.train),
            "validation_bytes": len(self.text.validation),
            "vocabulary": list(self.text.vocabulary),
        }

    def sizes(self) -> str:
        text = self.text
        return (
            f"{len(text.train):,} bytes for training, {len(text.validation):,} held out, "
            f"{self.num_classes} different ones"
        )

    @staticmethod
    def per_batch(config: Settings) -> int:
        return config.batch_size * config.context

    def inputs(self, count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, self.config.context), jnp.int32)

    def targets(self, count: int) -> jax.ShapeDtypeStruct:
        return self.inputs(count)

    def evaluation_inputs(self, first: Stage) -> Callable[[np.ndarray], jax.Array]:
        return lambda tokens: put(tokens, first.sharded)

    def rate(self, total: int, period: int) -> optax.Schedule:
        config = self.config
        config.check_warmup(total)
        return optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup_steps // period, math.ceil(total / period)
        )

    @staticmethod
    def optimizer(
        config: Settings, rate: optax.Schedule, schedule: Schedule, stage: int
    ) -> optax.GradientTransformation:
        return optimizer(config, rate, schedule, stage)

    @staticmethod
    def network(about: Mapping[str, Any]) -> list[Layer]:
        return layers(_settings(about), len(about["vocabulary"]))

    @staticmethod
    def example(about: Mapping[str, Any], count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, about["context"]), jnp.int32)

    @staticmethod
    def num_labels(about: Mapping[str, Any]) -> int:
        return len(about["vocabulary"])

    @staticmethod
    def tied(about: Mapping[str, Any], layers: list[Layer]) -> Tie | None:
        return tied(_settings(about), layers)


def layers(config: Settings, vocabulary: int) -> list[Layer]:
    """The network named by the settings, input first."""
    made = {"transformer": transformer, "reversible_transformer": reversible_transformer}
    return made[config.model](vocabulary, config.width, config.blocks, config.heads)


def tied(config: Settings, layers: list[Layer]) -> Tie | None:
    """Ties the head's kernel to the embedding's table, with --tie_embedding."""
    if not config.tie_embedding:
        return None
    last = sum(layer.size for layer in layers) - 1
    return fdg.tie(0, last, "token", "logits/kernel", transpose=True)


def optimizer(
    config: Settings, rate: optax.Schedule, schedule: Schedule, stage: int
) -> optax.GradientTransformation:
    """A stage's optimizer: clipping by its share of the norm, AdamW or Muon, then shrinking."""
    num_stages = schedule.num_stages
    own = remedies.StageSettings(
        rate,
        (schedule, stage),
        schedule.period,
        config.momentum,
        config.weight_decay,
        methods.beta(config),
        hops=num_stages - 1 - stage,
        mask=remedies.kernels,
        exclude="logits",
        clip_norm=config.clip_norm / math.sqrt(num_stages),
    )
    return remedies.optimizer(config, own)


def _settings(about: Mapping[str, Any]) -> Settings:
    config = Settings("-", **{name: about[name] for name in Text.makes})
    config.check()
    return config
