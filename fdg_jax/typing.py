"""Types that the rooms share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any
Key = jax.Array
LossFn = Callable[[PyTree, PyTree], tuple[jax.Array, dict[str, jax.Array]]]
