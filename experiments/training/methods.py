"""The training methods by name, each a schedule and a gradient rule."""

from __future__ import annotations

from typing import Protocol

import fdg_jax as fdg
from experiments.training import family
from fdg_jax.methods import METHODS, Method
from fdg_jax.schedule import Schedule

__all__ = ["METHODS", "Method", "beta", "gradient", "num_stages", "schedule"]


class Config(family.Settings, Protocol):
    """The settings of a method, part of every program's settings."""

    @property
    def method(self) -> str: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def order(self) -> str: ...
    @property
    def beta(self) -> float: ...
    @property
    def gradient(self) -> str: ...
    @property
    def microbatches(self) -> int: ...
    @property
    def accumulate(self) -> int | None: ...
    @property
    def reduction(self) -> str: ...


def num_stages(config: Config) -> int:
    """Number of stages: --num_stages, or 1 for methods that do not cut the network."""
    return 1 if METHODS[config.method].one_stage else config.num_stages


def schedule(config: Config) -> Schedule:
    """The schedule of ``config.method``.

    Raises:
      ValueError: an option of the schedule is out of bounds.
    """
    predicted, true = family.phases(config)
    # Options of other schedules are ignored.
    return fdg.schedule.create(
        METHODS[config.method].schedule,
        num_stages(config),
        order=config.order,
        microbatches=config.microbatches,
        accumulate=config.accumulate or METHODS[config.method].accumulate,
        reduction=config.reduction,
        predicted=predicted,
        true=true,
    )


def gradient(config: Config) -> str:
    """The gradient rule of ``config.method``."""
    return METHODS[config.method].gradient or config.gradient


def beta(config: Config) -> float:
    """The shrinking factor per hop."""
    return config.beta if METHODS[config.method].shrinks else 1.0
