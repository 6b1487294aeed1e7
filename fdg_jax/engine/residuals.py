"""The residuals of a forward, stored for its backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdg_jax.typing import PyTree


class Structure:
    """The structure of a VJP, from one trace.

    Compared by identity: JAX compares it at every call of a program, and two traces of a function
    never have equal VJPs.

    Attributes:
      treedef: the VJP's tree structure.
      sources: for each leaf, its position among the leaves of (params, inputs) followed by
        `Residuals.arrays`.
    """

    __slots__ = ("sources", "treedef")

    def __init__(self, treedef: Any, sources: list[int]) -> None:
        self.treedef = treedef
        self.sources = sources


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["structure"]
)
@dataclass(frozen=True)
class Residuals:
    """The residuals of a forward, without the weights and the input.

    Most residuals of a layer are its weights and its input. Both are stored anyway (batches share
    a weight version), so they are only referenced here. Residuals common to two layers, such as the
    output of a ReLU and the input of the convolution after it, are stored once.

    Attributes:
      arrays: the other leaves of the VJP.
      structure: needed to reassemble the VJP.
    """

    arrays: list[jax.Array]
    structure: Structure

    @staticmethod
    def of(vjp: PyTree, kept: PyTree) -> Residuals:
        known = jax.tree.leaves(kept)
        position = {id(leaf): i for i, leaf in enumerate(known)}
        arrays: list[jax.Array] = []
        leaves, treedef = jax.tree.flatten(vjp)
        for leaf in leaves:
            if id(leaf) not in position:
                position[id(leaf)] = len(known) + len(arrays)
                arrays.append(leaf)
        return Residuals(arrays, Structure(treedef, [position[id(leaf)] for leaf in leaves]))

    def vjp(self, kept: PyTree) -> Callable[[PyTree], tuple[PyTree, ...]]:
        leaves = [*jax.tree.leaves(kept), *self.arrays]
        own = self.structure
        return jax.tree.unflatten(own.treedef, [leaves[i] for i in own.sources])


def split_inexact(tree: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """The differentiable leaves of ``tree``, and a function that puts them back."""
    leaves, structure = jax.tree.flatten(tree)
    moving = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def join(values: list[jax.Array]) -> PyTree:
        full = list(leaves)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in moving], join


class Stash(NamedTuple):
    """The stored data of a mini-batch in flight, apart from weights.

    Attributes:
      inputs, labels, model_state, number: arguments of its forward; labels if the stage uses them.
      residuals: of its forward; None if the backward recomputes the forward.
    """

    inputs: PyTree
    labels: PyTree
    model_state: PyTree
    number: jax.Array
    residuals: Residuals | None
