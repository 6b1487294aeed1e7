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
    """Mini-batches of arrays, input and labels, without end, that can go on where they were."""

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
    """What a run trains, made from its settings; one class for each program.

    Attributes:
      unit: what speeds count; "images" makes images_per_second in the run's files.
      metric: loss or error: of the evaluations the lowest is the best, and it is the result.
      images: whether stages pass images on, and not vectors.
      size: the setting that makes the network larger.
      makes: the settings that say what the network computes.
      described: what `network` and `example` need beside them, and who uses the model.
      loss_fn: loss and error of a mini-batch.
      config: the settings.
      name: of the data, as it is shown.
      split: of the data that evaluations are on.
      loader: the mini-batches.
      held_out: inputs and labels of the evaluations.
      num_classes: how many labels there are.
      layers: the network, input first.
      tie: of two of its layers, or None.
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
        """What config.json says of data and network beside the settings, fit for JSON."""

    @abc.abstractmethod
    def sizes(self) -> str:
        """How much data there is, for the screen."""

    @staticmethod
    @abc.abstractmethod
    def per_batch(config: C) -> int:
        """How many of `unit` a mini-batch has."""

    @abc.abstractmethod
    def inputs(self, count: int) -> jax.ShapeDtypeStruct:
        """Of so many examples."""

    @abc.abstractmethod
    def targets(self, count: int) -> jax.ShapeDtypeStruct:
        """Their labels."""

    def training_inputs(self, first: Stage) -> Callable[[np.ndarray, int], jax.Array]:
        """What makes an input on the first stage of a mini-batch and the number of its step."""
        evaluated = self.evaluation_inputs(first)
        return lambda x, step: evaluated(x)

    @abc.abstractmethod
    def evaluation_inputs(self, first: Stage) -> Callable[[np.ndarray], jax.Array]:
        """The same where nothing is drawn."""

    def leave_out_inputs(self) -> None:
        """Frees what only a process with the first stage reads."""

    def held_for_choice(self, wanted: int) -> int:
        """How many examples are held out of train to choose a setting on.

        Args:
          wanted: so many; 0 takes a tenth.

        Raises:
          UsageError: there is no split for testing beside them, or they are too many.
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
          period: steps in an update.
        """

    @staticmethod
    @abc.abstractmethod
    def optimizer(
        config: C, rate: optax.Schedule, schedule: Schedule, stage: int
    ) -> optax.GradientTransformation:
        """A stage's optimizer."""

    # --- What a model without its run is made from: config.json, or the metadata of an export.

    @staticmethod
    @abc.abstractmethod
    def network(about: Mapping[str, Any]) -> list[Layer]:
        """The network, from the settings in `makes` and what is in `described`.

        Raises:
          ValueError, KeyError, TypeError: they name none.
        """

    @staticmethod
    @abc.abstractmethod
    def example(about: Mapping[str, Any], count: int) -> jax.ShapeDtypeStruct:
        """So many of its inputs."""

    @staticmethod
    @abc.abstractmethod
    def num_labels(about: Mapping[str, Any]) -> int:
        """How many labels there are."""

    @staticmethod
    def tied(about: Mapping[str, Any], layers: list[Layer]) -> Tie | None:
        """Which of the network's arrays are one."""
        del about, layers
        return None
