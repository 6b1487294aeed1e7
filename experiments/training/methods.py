"""The training methods by name: each is a schedule and a choice of gradient of the same engine."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import fdg_jax as fdg
from fdg_jax.schedule import Schedule


class Config(Protocol):
    """The settings that a method is made from; every program's own have them among others."""

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


@dataclasses.dataclass(frozen=True)
class Method:
    """What makes a method.

    Attributes:
      schedule: its name in `fdg_jax.schedule`.
      gradient: the choice that belongs to the method; None leaves it to --gradient.
      shrinks: whether --beta applies.
      one_stage: whether the devices share one stage instead of having one each.
      stale: whether gradients are, so that a remedy has something to mend.
    """

    schedule: str
    gradient: str | None = None
    shrinks: bool = False
    one_stage: bool = False
    stale: bool = True


METHODS = {
    "backprop": Method("backprop", stale=False),
    "fdg": Method("fdg", shrinks=True),
    "ddg": Method("ddg"),
    "pipedream": Method("pipedream"),
    "pipedream_2bw": Method("pipedream_2bw"),
    "gpipe": Method("gpipe", stale=False),
    "one_f_one_b": Method("one_f_one_b", stale=False),
    "adl": Method("adl"),
    "fr": Method("ddg", gradient="recompute"),
    "dsp": Method("fdg", gradient="recompute"),
    "data_parallel": Method("backprop", one_stage=True, stale=False),
}


def num_stages(config: Config) -> int:
    """Stages of the pipeline: --num_stages, but for methods that do not cut the network."""
    return 1 if METHODS[config.method].one_stage else config.num_stages


def schedule(config: Config) -> Schedule:
    """The schedule of ``config.method``.

    Raises:
      ValueError: an option that the schedule uses is out of its bounds.
    """
    # A schedule takes the options that it has and ignores the others.
    return fdg.schedule.create(
        METHODS[config.method].schedule,
        num_stages(config),
        order=config.order,
        microbatches=config.microbatches,
        accumulate=config.accumulate,
        reduction=config.reduction,
    )


def gradient(config: Config) -> str:
    """The choice of gradient of ``config.method``."""
    return METHODS[config.method].gradient or config.gradient


def beta(config: Config) -> float:
    """The shrinking factor a hop."""
    return config.beta if METHODS[config.method].shrinks else 1.0
