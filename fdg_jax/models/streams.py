"""Inputs of auxiliary networks: an array, or streams joined along the last axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fdg_jax.typing import PyTree


def position(owner: str, y: PyTree) -> tuple[int, ...]:
    """The common leading axes of all arrays of ``y``.

    Raises:
      ValueError: the arrays differ in them; the message names ``owner``.
    """
    axes = {leaf.shape[:-1] for leaf in jax.tree.leaves(y)}
    if len(axes) != 1 or any(not leaf.shape for leaf in jax.tree.leaves(y)):
        raise ValueError(
            f"{owner}: its input is {shapes(y)}; give one array, or streams that differ in nothing "
            "but their last axis"
        )
    return axes.pop()


def shapes(y: PyTree) -> str:
    """The shapes of all arrays, as text."""
    return ", ".join(str(list(leaf.shape)) for leaf in jax.tree.leaves(y)) or "no array"


def widths(y: PyTree) -> list[int]:
    """The last axis of each array."""
    return [leaf.shape[-1] for leaf in jax.tree.leaves(y)]


def joined(y: PyTree) -> jax.Array:
    """All arrays concatenated along the last axis."""
    return jnp.concatenate(jax.tree.leaves(y), axis=-1)
