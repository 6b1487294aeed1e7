"""Validation of optax transformations."""

from __future__ import annotations

from typing import Any

import optax


def transformation(
    optimizer: Any, remedy: str = "give one, such as optax.sgd(0.1)"
) -> optax.GradientTransformationExtraArgs:
    """Converts an optax transformation to one whose update takes extra arguments.

    Args:
      optimizer: the argument of that name.
      remedy: the end of the error message.

    Raises:
      ValueError: it has no ``init`` and ``update``.

    Example:
      >>> import optax
      >>> transformation(optax.sgd)
      Traceback (most recent call last):
      ...
      ValueError: optimizer: sgd is a function, no optax transformation; give one, such as \
optax.sgd(0.1)
    """
    if callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None)):
        return optax.with_extra_args_support(optimizer)
    given = f"{optimizer!r} is"
    if callable(optimizer) and hasattr(optimizer, "__name__"):
        given = f"{optimizer.__name__} is a function,"
    raise ValueError(f"optimizer: {given} no optax transformation; {remedy}")
