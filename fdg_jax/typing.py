"""Types used by several modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any
Key = jax.Array
# The mean loss, or a sum and the weight to divide it by; and metrics.
Loss = jax.Array | tuple[jax.Array, jax.Array]
LossFn = Callable[[PyTree, PyTree], tuple[Loss, dict[str, jax.Array]]]
# What is made of one for a stage (`fdg_jax.engine.loss`): a scalar, and what is reported.
LossOfPart = Callable[[PyTree, PyTree], tuple[jax.Array, Any]]
