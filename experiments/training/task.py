"""The task of a training: data, network, optimizer and metrics."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.errors import UsageError
from experiments.training.config import Config
from fdg_jax.engine.stage import Stage
from fdg_jax.layer import Layer
from fdg_jax.schedule import Schedule
from fdg_jax.tie import Tie

C = TypeVar("C", bound=Config)


class Loader(Protocol):
    """An endless, resumable iterator of mini-batches (inputs, labels) of arrays."""

    @property
    def steps_per_epoch(self) -> float: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> tuple[np.ndarray, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def loss_fn(outputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy, and the fraction of wrong answers."""
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()
    return loss, {"error": jnp.mean(jnp.argmax(outputs, axis=-1) != labels)}


class Task(abc.ABC, Generic[C]):
    """The task of a run, created from its settings; one class per program.

    Attributes:
      unit: the unit of speeds; "images" becomes images_per_second in the run's files.
      metric: "loss" or "error", the result of a run; the lowest evaluation is the best.
      images: whether stages exchange images instead of vectors.
      size: the setting of the network's size.
      makes: the settings that determine the network's computation.
      described: further data needed by `network`, `example` and users of the model.
      loss_fn: loss and error of a mini-batch.
      config: the settings.
      name: displayed name of the data.
      split: the split used for evaluations.
      loader: the mini-batches.
      held_out: inputs and labels of the evaluations.
      num_classes: number of labels.
      layers: the network, input first.
      tie: a tie of two of its layers, or None.
    """

    unit: ClassVar[str]
    metric: ClassVar[str]
    images: ClassVar[bool]
    size: ClassVar[str]
    makes: ClassVar[tuple[str, ...]]
    described: ClassVar[tuple[str, ...]]
    loss_fn = staticmethod(loss_fn)

    config: C
    name: str
    split: str
    loader: Loader
    held_out: tuple[np.ndarray, np.ndarray]
    num_classes: int
    layers: list[Layer]
    tie: Tie | None

    @abc.abstractmethod
    def __init__(self, config: C) -> None:
        """Loads the data and makes the network; writes nothing.

        Raises:
          UsageError: a setting does not fit the data or the network.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Data and network in config.json, besides the settings, as JSON data."""

    @abc.abstractmethod
    def sizes(self) -> str:
        """The sizes of the data, for the console."""

    @staticmethod
    @abc.abstractmethod
    def per_batch(config: C) -> int:
        """Size of a mini-batch in `unit`."""

    @abc.abstractmethod
    def inputs(self, count: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the inputs of ``count`` examples."""

    @abc.abstractmethod
    def targets(self, count: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the labels of ``count`` examples."""

    def training_inputs(self, first: Stage) -> Callable[[np.ndarray, int], jax.Array]:
        """A function from a mini-batch and its step to an input on the first stage."""
        evaluated = self.evaluation_inputs(first)
        return lambda x, step: evaluated(x)

    @abc.abstractmethod
    def evaluation_inputs(self, first: Stage) -> Callable[[np.ndarray], jax.Array]:
        """The same for evaluation, without random augmentation."""

    def leave_out_inputs(self) -> None:
        """Frees data used only by processes with the first stage."""

    def held_for_choice(self, wanted: int) -> int:
        """The number of train examples held out for selecting a setting.

        Args:
          wanted: the requested number; 0: a tenth.

        Raises:
          UsageError: there is no separate test split, or the number is too large.
        """
        raise UsageError(
            f"--choose_beta: experiments.{self.config.PROGRAM} has no data for testing beside "
            "those held out; leave it out, and compare --betas"
        )

    @abc.abstractmethod
    def rate(self, total: int, period: int) -> optax.Schedule:
        """The learning rate of every update.

        Args:
          total: steps of the run.
          period: steps per update.
        """

    @staticmethod
    @abc.abstractmethod
    def optimizer(
        config: C, rate: optax.Schedule, schedule: Schedule, stage: int
    ) -> optax.GradientTransformation:
        """A stage's optimizer."""

    # --- Creation of a model without its run, from config.json or the metadata of an export.

    @staticmethod
    @abc.abstractmethod
    def network(about: Mapping[str, Any]) -> list[Layer]:
        """The network, from the entries in `makes` and `described`.

        Raises:
          ValueError, KeyError, TypeError: they name no network.
        """

    @staticmethod
    @abc.abstractmethod
    def example(about: Mapping[str, Any], count: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of ``count`` of its inputs."""

    @staticmethod
    @abc.abstractmethod
    def num_labels(about: Mapping[str, Any]) -> int:
        """The number of labels."""

    @staticmethod
    def tied(about: Mapping[str, Any], layers: list[Layer]) -> Tie | None:
        """The tie of the network, or None."""
        del about, layers
        return None
