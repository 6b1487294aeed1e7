"""Types used by several modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any
Key = jax.Array
# The mean loss, or a pair (sum, weight).
Loss = jax.Array | tuple[jax.Array, jax.Array]
LossFn = Callable[[PyTree, PyTree], tuple[Loss, dict[str, jax.Array]]]
# A stage's form of a loss function (`fdg_jax.engine.loss`): a scalar, and auxiliary output.
LossOfPart = Callable[[PyTree, PyTree], tuple[jax.Array, Any]]
