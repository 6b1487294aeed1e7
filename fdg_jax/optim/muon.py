"""Selects the arrays that Muon optimizes, and their shapes as matrices."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import optax
from optax.contrib import MuonDimensionNumbers


def muon_dimension_numbers(
    include: str = "kernel", exclude: str = ""
) -> Callable[[optax.Params], optax.Params]:
    """The argument ``muon_weight_dimension_numbers`` of ``optax.contrib.muon`` for lists of layers.

    By default Muon optimizes all arrays with two axes, including embeddings and the biases stacked
    by `fdg_jax.repeat`, but neither stacked matrices nor convolutions. Of the arrays whose path
    matches ``include``, this function selects

        [inputs, outputs]                   a dense layer
        [blocks, inputs, outputs]           the same, stacked
        [rows, columns, inputs, outputs]    a convolution: [rows * columns * inputs, outputs]
        [blocks, rows, ..., outputs]        the same, stacked

    Args:
      include: a regular expression, searched in an array's path, such as ``['qkv']['kernel']``;
        matching arrays are for Muon.
      exclude: the same for arrays that are not for Muon, usually the last layer.

    Returns:
      A function from the parameters to a pytree of ``optax.contrib.MuonDimensionNumbers``, with
      None for arrays that Adam optimizes.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"qkv": {"kernel": jnp.ones((2, 4, 12)), "bias": jnp.ones((2, 12))}}
      >>> numbers = muon_dimension_numbers(exclude="logits")(params)
      >>> numbers["qkv"]["kernel"], numbers["qkv"]["bias"]
      (MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,)), None)

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    wanted, others = re.compile(include), re.compile(exclude or "(?!)")

    def one(path: jax.tree_util.KeyPath, leaf: jax.Array) -> MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        first = {2: 0, 3: 1, 4: 0, 5: 1}.get(leaf.ndim)
        if first is None or not wanted.search(name) or others.search(name):
            return None
        return MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), (leaf.ndim - 1,))

    return lambda params: jax.tree_util.tree_map_with_path(one, params)
