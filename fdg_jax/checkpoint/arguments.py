"""Validation of the arguments of a save."""

from __future__ import annotations

import math
import operator
from typing import Any

from fdg_jax.checkpoint import manifest


def step_of(step: Any) -> int:
    """The step of a checkpoint, from an integer of Python, numpy or JAX.

    Raises:
      ValueError: it is not an integer, or is out of range.

    Example:
      >>> import numpy as np
      >>> step_of(np.int64(3))
      3
    """
    try:
        number = operator.index(step)
    except TypeError as error:
        raise ValueError(f"step={step!r}: is no whole number; count steps from 0") from error
    if not 0 <= number <= manifest.MOST:
        raise ValueError(f"step={number}: must be in 0..{manifest.MOST}; count steps from 0")
    return number


def score_of(score: Any) -> float | None:
    """The score of a state, or None if it has none or is not a number.

    Raises:
      ValueError: it cannot be converted to a number.
    """
    try:
        number = None if score is None else float(score)
    except (TypeError, ValueError) as error:
        raise ValueError(f"score={score!r}: is no number; give one, or None") from error
    return None if number is None or math.isnan(number) else number
