"""Runs the programs of stages independently of the program's own mesh (``jax.set_mesh``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh


@contextlib.contextmanager
def no_active_mesh() -> Iterator[None]:
    """Deactivates the current mesh, so that programs run on their stage's devices.

    Example:
      >>> with jax.set_mesh(jax.make_mesh((1,), ("data",))), no_active_mesh():
      ...     print(jax.sharding.get_abstract_mesh().empty)
      True
    """
    if jax.sharding.get_abstract_mesh().empty:
        yield
        return
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        yield
