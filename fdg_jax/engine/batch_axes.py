"""Checks that the arrays of a batch divide into micro-batches and over a stage's devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from fdg_jax.shared import is_shared, plain
from fdg_jax.typing import PyTree


def check_axes(batch: dict[str, PyTree], microbatches: int, devices: int) -> None:
    """Rejects a batch that cannot be divided.

    Micro-batches are cut along axis 0, which must have the same size in all arrays except scalars
    and those marked with `fdg_jax.shared`. Devices only divide the work: an array that cannot be
    sharded is replicated, which changes no result, but one of the inputs must be divisible.

    Args:
      batch: its parts by name, "inputs" among them; only shapes are used.
      microbatches: the number of micro-batches per mini-batch.
      devices: the number of devices of a stage.

    Raises:
      ValueError: first axes differ or are not divisible; the message names the remedy.

    Example:
      >>> check_axes({"inputs": np.ones((8, 3)), "labels": np.ones(8)}, 4, 2)
    """
    axes = {name: shape[0] for name, shape in _shapes(batch).items() if shape}
    if microbatches > 1 and len(set(axes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in axes.items())
        raise ValueError(
            f"batch: is divided into {microbatches} micro-batches along the first axis of its "
            f"arrays, and these differ: {listed}; mark an array without a batch axis with "
            "fdg_jax.shared(array)"
        )
    for name, size in axes.items() if microbatches > 1 else ():
        if size % microbatches:
            raise ValueError(
                f"{name}: a batch of {size} does not divide into {microbatches} micro-batches; "
                "take a multiple"
            )
    sizes = [size // microbatches for name, size in axes.items() if name.startswith("inputs")]
    if sizes and all(size % devices for size in sizes):
        raise ValueError(
            f"inputs: a batch of {max(sizes)} does not divide over the {devices} devices of a "
            "stage; take a multiple"
        )


def undivided(x: PyTree, devices: int) -> PyTree:
    """Inputs of schedules without micro-batches, with marks removed.

    Args:
      x: inputs of a prediction.
      devices: the number of devices of a stage.

    Raises:
      ValueError: no array is divisible over the devices.
    """
    check_axes({"inputs": x}, 1, devices)
    return plain(x)


def _shapes(batch: dict[str, PyTree]) -> dict[str, tuple[int, ...]]:
    """The shapes of the unmarked arrays, by path."""
    found: list[tuple[Any, Any]] = jax.tree_util.tree_leaves_with_path(batch, is_leaf=is_shared)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in found:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for one in jax.tree.leaves(leaf):
            dtype = getattr(one, "dtype", None) or np.asarray(one).dtype
            if isinstance(dtype, np.dtype) and dtype.kind in "OSUMm":
                raise ValueError(
                    f"{name}: a {type(one).__name__} ({dtype}) is no array of numbers; leave it out"
                )
        if not is_shared(leaf):
            shapes[name] = np.shape(leaf)
    return shapes
