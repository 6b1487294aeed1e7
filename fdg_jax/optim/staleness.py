"""The staleness of a stage: a number of updates, or counted from a schedule."""

from __future__ import annotations

import math
from typing import Protocol

import jax
import numpy as np


class Schedule(Protocol):
    """The interface of a schedule; implemented by `fdg_jax.schedule.Schedule`."""

    def mean_staleness(self, k: int) -> float: ...


# A number of updates, or a schedule and one of its stages.
Staleness = float | tuple[Schedule, int]


def updates_late(staleness: Staleness) -> float:
    """The staleness as a number of updates.

    Args:
      staleness: updates of the stage between a batch's forward and the use of its gradient, a
        number >= 0; or ``(schedule, k)``, for the mean over the batches of stage k in that
        schedule.

    Returns:
      A number of updates >= 0; may be fractional if gradients of different age are summed.

    Raises:
      ValueError: it is neither.

    Example:
      >>> from fdg_jax import schedule
      >>> updates_late(3), updates_late((schedule.fdg(4), 0))
      (3.0, 6.0)
    """
    if isinstance(staleness, tuple) and len(staleness) == 2:
        schedule, k = staleness
        if hasattr(schedule, "mean_staleness") and isinstance(k, int | np.integer):
            return float(schedule.mean_staleness(int(k)))
    late = as_float("staleness", staleness)
    if not 0 <= late < math.inf:
        plain = staleness is None or isinstance(staleness, int | float | str)
        given = f"={staleness}" if plain else f": is a {type(staleness).__name__}"
        raise ValueError(
            f"staleness{given}: must be a number of updates >= 0, or (schedule, stage); "
            "2 * (K - 1 - k) is stage k's in FDG"
        )
    return late


def checked_number(name: str, value: float, least: float, most: float, hint: str) -> float:
    """``value`` if it is a number with least <= value < most; otherwise raises `ValueError`."""
    known = as_float(name, value)
    if not least <= known < most:
        bounds = f"at least {least:g}" + (f" and below {most:g}" if most < math.inf else "")
        raise ValueError(f"{name}={value}: must be a number, {bounds}; {hint}")
    return known


def as_float(name: str, value: object) -> float:
    """A value as a float, or NaN."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name}: must be a Python number, which decides what is compiled; name it in "
            "static_args of optax.inject_hyperparams"
        )
    if isinstance(value, str) or np.ndim(value) != 0:  # type: ignore[arg-type]
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
