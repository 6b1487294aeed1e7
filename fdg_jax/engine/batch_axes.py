"""Checks that the arrays of a batch divide into micro-batches and over a stage's devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from fdg_jax.shared import is_shared, plain
from fdg_jax.typing import PyTree


def check_axes(batch: dict[str, PyTree], microbatches: int, devices: int) -> None:
    """Rejects a batch that cannot be divided.

    Micro-batches are cut along axis 0: all arrays need the same one, but for scalars and those that
    are marked with `fdg_jax.shared`. Devices only share out the work: an array that they do not
    divide is whole on each of them, which changes no result, and one of the inputs must divide.

    Args:
      batch: its parts by name, "inputs" among them; only shapes are looked at.
      microbatches: into how many parts a schedule divides it.
      devices: of a stage.

    Raises:
      ValueError: first axes that differ, or do not divide; the message names the remedy.

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
      devices: of a stage.

    Raises:
      ValueError: no array divides over the devices.
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
