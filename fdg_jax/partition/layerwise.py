"""Parameters layer by layer, independent of cuts and stacking.

    chain([a, repeat(b, 2), c])     a network of four layers
    (A, B, C)                       its params: B has those of two layers, stacked
    [A, B[0], B[1], C]              `separate` gives one pytree per layer, `join` is its inverse

Stages are chains, too, and the cuts of a partition determine their tuples and stacks. One pytree
per layer is independent of them. Layers are numbered as by `Layer.at`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fdg_jax.head import Headed
from fdg_jax.layer import Chain, Layer
from fdg_jax.repeat import Repeat
from fdg_jax.tied_stage import Tied
from fdg_jax.typing import PyTree


def separate(layer: Layer, tree: PyTree) -> list[PyTree]:
    """Splits the params of a network, or a tree of the same form, into layers.

    Args:
      layer: the network: any nesting of `chain` and `repeat`. For all stages of a pipeline it is
        ``chain(stages)``, and ``tree`` the tuple of their trees.
      tree: its params, or a tree of the same layout: model state, momentum, a gradient.

    Returns:
      ``layer.size`` pytrees, each in the layout of its layer; a head of a stage
      (`fdg_jax.with_head`) is not a layer of the network and left out.

    Raises:
      ValueError: the tree does not have the network's layout.

    Example:
      >>> import numpy as np
      >>> from fdg_jax import chain, from_fn, repeat
      >>> net = chain([from_fn(abs), repeat(from_fn(abs), 2)])
      >>> separate(net, ("A", {"w": np.array([1.0, 2.0])}))
      ['A', {'w': np.float64(1.0)}, {'w': np.float64(2.0)}]
    """
    if isinstance(layer, Chain):
        if not isinstance(tree, tuple) or len(tree) != len(layer.layers):
            raise ValueError(
                f"tree: a chain of {len(layer.layers)} layers has a tuple of as many, and this is "
                f"{type(tree).__name__} {jax.tree.structure(tree)}; give what this network made"
            )
        pairs = list(zip(layer.layers, tree, strict=True))
    elif isinstance(layer, Repeat):
        assert layer.layer is not None
        for leaf in jax.tree.leaves(tree):
            if np.shape(leaf)[:1] != (layer.times,):
                raise ValueError(
                    f"tree: {layer.times} repeated layers are stacked along a first axis of "
                    f"{layer.times}, and an array is {list(np.shape(leaf))}; give what this "
                    "network made"
                )
        pairs = [
            (layer.layer, jax.tree.map(lambda leaf, i=i: leaf[i], tree)) for i in range(layer.times)
        ]
    elif isinstance(layer, Headed):
        assert layer.body is not None
        pairs = [(layer.body, tree[0])]
    elif isinstance(layer, Tied):
        assert layer.body is not None
        pairs = [(layer.body, tree)]
    else:
        return [tree]
    return [part for inner, own in pairs for part in separate(inner, own)]


def join(layer: Layer, parts: Sequence[PyTree]) -> PyTree:
    """Joins the params of layers to those of a network; the inverse of `separate`.

    Args:
      layer: the network: any nesting of `chain` and `repeat`.
      parts: ``layer.size`` pytrees.

    Returns:
      One pytree in the network's layout; stacked arrays are numpy arrays.

    Raises:
      ValueError: the number of pytrees differs, or repeated layers are not equal.

    Example:
      >>> import numpy as np
      >>> from fdg_jax import chain, from_fn, repeat
      >>> net = chain([from_fn(abs), repeat(from_fn(abs), 2)])
      >>> join(net, ["A", {"w": np.float64(1)}, {"w": np.float64(2)}])
      ('A', {'w': array([1., 2.])})
    """
    if len(parts) != layer.size:
        raise ValueError(f"parts: {len(parts)} do not make {layer.size} layers; give one a layer")
    if isinstance(layer, Chain):
        joined = []
        for inner in layer.layers:
            joined.append(join(inner, parts[: inner.size]))
            parts = parts[inner.size :]
        return tuple(joined)
    if isinstance(layer, Tied):
        assert layer.body is not None
        return join(layer.body, parts)
    if isinstance(layer, Repeat):
        assert layer.layer is not None
        size = layer.layer.size
        equal = [join(layer.layer, parts[i : i + size]) for i in range(0, len(parts), size)]
        for tree in equal:
            if difference(tree, equal[0]):
                raise ValueError(
                    f"parts: repeated layers must be equal, but {difference(tree, equal[0])}; give "
                    "those of this network"
                )
        return jax.tree.map(lambda *leaves: np.stack(leaves), *equal)
    return parts[0]


def difference(a: PyTree, b: PyTree) -> str | None:
    """The first structural difference of two pytrees, ignoring values; None if there is none.

    Args:
      a, b: pytrees of arrays, which may be abstract.

    Returns:
      A phrase that names the first array that is missing in one or differs in dtype or shape.

    Example:
      >>> import numpy as np
      >>> difference({"w": np.zeros((2, 3))}, {"w": np.zeros((2, 4))})
      'w is float64[2,3] in one and float64[2,4] in the other'
    """
    if found := _differing(a, b):
        name, *sides = found
        return f"{name} is {sides[0]} in one and {sides[1]} in the other"
    structures: list[Any] = [jax.tree.structure(tree) for tree in (a, b)]
    if structures[0] != structures[1]:
        return f"one is {structures[0]}, the other {structures[1]}"
    return None


def change(old: PyTree, new: PyTree) -> str | None:
    """The first structural change of a pytree; None if unchanged.

    Args:
      old, new: pytrees of arrays, which may be abstract.

    Returns:
      A phrase that names the first array added, removed, or changed in dtype or shape.

    Example:
      >>> import numpy as np
      >>> change({"w": np.zeros(2, np.int32)}, {"w": np.zeros(2, np.float32)})
      'w from int32[2] to float32[2]'
    """
    if found := _differing(old, new):
        return f"{found[0]} from {found[1]} to {found[2]}"
    structures: list[Any] = [jax.tree.structure(tree) for tree in (old, new)]
    if structures[0] != structures[1]:
        return f"from {structures[0]} to {structures[1]}"
    return None


def _differing(a: PyTree, b: PyTree) -> tuple[str, str, str] | None:
    """The first differing array, and both versions."""
    ours, theirs = _signatures(a), _signatures(b)
    for name in [*ours, *theirs]:
        found = [side.get(name, "missing") for side in (ours, theirs)]
        if found[0] != found[1]:
            return name, found[0], found[1]
    return None


def _signatures(tree: PyTree) -> dict[str, str]:
    def signature(leaf: Any) -> str:
        if not hasattr(leaf, "dtype"):
            return f"a {type(leaf).__name__}"
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "it": signature(leaf)
        for path, leaf in leaves
    }
