"""The training methods by name: each is a schedule of the same engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import fdg_jax as fdg
from fdg_jax.schedule import Schedule

if TYPE_CHECKING:
    from experiments.config import Config


def _backprop(config: Config) -> Schedule:
    return fdg.schedule.backprop(config.num_stages)


def _fdg(config: Config) -> Schedule:
    return fdg.schedule.fdg(config.num_stages, cast("fdg.schedule.Order", config.order))


METHODS: dict[str, Callable[[Config], Schedule]] = {"backprop": _backprop, "fdg": _fdg}

# Methods whose gradient is delayed, so that shrinking means something; the others ignore --beta.
SHRINKS = ("fdg",)


def schedule(config: Config) -> Schedule:
    """The schedule of ``config.method``."""
    return METHODS[config.method](config)


def shrink_factor(config: Config, k: int) -> float:
    """What stage k's gradient is multiplied with: beta to the power of its hops, or 1."""
    return config.beta ** (config.num_stages - 1 - k) if config.method in SHRINKS else 1.0
