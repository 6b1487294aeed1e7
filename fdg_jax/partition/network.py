"""A stage's parameters as part of the network's.

    stage 0: (A, B)    stage 1: (C, stack of D and E)    network: layers 0 to 4
    (A, B, None, None, None)    (None, None, C, stack, InStack())

So a path begins with the layer's number in the network, independent of the cuts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fdg_jax.head import Headed
from fdg_jax.layer import Chain, Layer
from fdg_jax.tied_stage import Tied
from fdg_jax.typing import PyTree


class InStack(NamedTuple):
    """Placeholder for a layer of a `fdg_jax.repeat` whose arrays are in the stack at an earlier
    layer; a pytree without arrays."""


@dataclass(frozen=True)
class Place:
    """The position of a stage in the network.

    Args:
      layer: the stage.
      start: number of its first layer.
      total: number of layers of the network.
      headed: whether stages have heads (`fdg_jax.with_head`), placed after the last layer.
    """

    layer: Layer
    start: int
    total: int
    headed: bool = False

    @property
    def layers(self) -> range:
        """The numbers of the stage's layers."""
        return range(self.start, self.start + self.layer.size)

    def whole(self, tree: PyTree) -> PyTree:
        """Converts a tree in the stage's layout to the network's.

        Args:
          tree: params of the stage, or a tree that mirrors them.

        Returns:
          A tuple with one entry per layer of the network, and one more for the stage's head if
          stages have heads: the layer's own tree; None for layers of other stages; for repeated
          layers the stack at the first one, `InStack` at the others.

        Example:
          >>> from fdg_jax import chain, from_fn, repeat
          >>> place = Place(chain([from_fn(abs), repeat(from_fn(abs), 2)]), start=1, total=5)
          >>> place.whole(("A", "stack"))
          (None, 'A', 'stack', InStack(), None)
        """
        found: list[PyTree] = [None] * (self.total + self.headed)
        number = self.start
        for size, own in _units(self.layer, tree):
            if not size:
                found[-1] = own
                continue
            found[number : number + size] = [own, *[InStack()] * (size - 1)]
            number += size
        return tuple(found)

    def own(self, tree: PyTree) -> PyTree:
        """The inverse of `whole`.

        Args:
          tree: a result of `whole`.

        Returns:
          A tree like the stage's params.

        Example:
          >>> from fdg_jax import chain, from_fn
          >>> place = Place(chain([from_fn(abs)]), start=1, total=3)
          >>> place.own(place.whole(("A",)))
          ('A',)
        """
        return _stage(self.layer, tree, self.start)


def units(layer: Layer, number: int = 0) -> Iterator[tuple[int, Layer]]:
    """The layers of a network with their numbers; a `fdg_jax.repeat` is one layer.

    Args:
      layer: the network: any nesting of `fdg_jax.chain`.
      number: number of the first.

    Yields:
      Numbers and layers.
    """
    if isinstance(layer, Chain):
        for inner in layer.layers:
            yield from units(inner, number)
            number += inner.size
    elif isinstance(layer, (Headed, Tied)):
        assert layer.body is not None
        yield from units(layer.body, number)
    else:
        yield number, layer


def has_head(layer: Layer) -> bool:
    """Whether a stage has its own head (`fdg_jax.with_head`)."""
    return isinstance(layer, Headed) or isinstance(getattr(layer, "body", None), Headed)


def _units(layer: Layer, tree: PyTree) -> Iterator[tuple[int, PyTree]]:
    """Sizes and trees of the layers; a head has size 0."""
    if isinstance(layer, Chain):
        for inner, own in zip(layer.layers, tree, strict=True):
            yield from _units(inner, own)
    elif isinstance(layer, Headed):
        assert layer.body is not None
        yield from _units(layer.body, tree[0])
        yield 0, tree[1]
    elif isinstance(layer, Tied):
        assert layer.body is not None
        yield from _units(layer.body, tree)
    else:
        yield layer.size, tree


def _stage(layer: Layer, tree: PyTree, number: int) -> PyTree:
    if isinstance(layer, Chain):
        found = []
        for inner in layer.layers:
            found.append(_stage(inner, tree, number))
            number += inner.size
        return tuple(found)
    if isinstance(layer, (Headed, Tied)):
        assert layer.body is not None
        own = _stage(layer.body, tree, number)
        return (own, tree[-1]) if isinstance(layer, Headed) else own
    return tree[number]
