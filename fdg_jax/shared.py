"""Arrays of a batch without a batch axis, such as class weights or a mask [T, T].

(images, (labels, shared(class_weights)))         images, labels   [B, ...]   divided
                                                  class_weights    [C]        copied to each part
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax

from fdg_jax.typing import PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
@dataclass(frozen=True)
class Shared:
    """A part of a batch that is never split; made by `shared`."""

    value: PyTree


def shared(value: PyTree) -> Shared:
    """Marks a part of a batch as having no batch axis.

    A schedule with micro-batches divides the other arrays along axis 0 and passes this one
    unchanged to each micro-batch. Layers and losses receive the value without the mark. Scalars
    need no mark, and neither do batches that are not divided.

    Args:
      value: an array or a pytree of arrays of any shapes.

    Returns:
      A pytree that replaces the array in batches and example batches.

    Example:
      >>> import numpy as np
      >>> weights = np.array([0.2, 0.8])
      >>> batch = np.ones((8, 3)), (np.zeros(8, int), shared(weights))
      >>> plain(batch)[1][1].tolist()
      [0.2, 0.8]
    """
    return Shared(value)


def is_shared(part: PyTree) -> bool:
    """Whether a part of a batch is marked."""
    return isinstance(part, Shared)


def plain(tree: PyTree) -> PyTree:
    """A batch with its marks removed, as layers and losses receive it."""
    return jax.tree.map(
        lambda part: plain(part.value) if is_shared(part) else part, tree, is_leaf=is_shared
    )
