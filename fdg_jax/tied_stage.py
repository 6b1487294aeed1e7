"""Stages that own or use tied weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from fdg_jax.head import Headed
from fdg_jax.layer import Chain, Layer
from fdg_jax.tie import Borrowed, Paired, Tie, TiedArray
from fdg_jax.typing import Key, PyTree


@dataclass(frozen=True)
class Tied(Layer):
    """A stage that owns or uses a tied array.

    Attributes:
      body: the stage.
      tie: the tied array.
      owner, user: position of these layers in the stage's params; None: in another stage.
    """

    body: Layer | None = None
    tie: Tie | None = None
    owner: tuple[Any, ...] | None = None
    user: tuple[Any, ...] | None = None

    @property
    def size(self) -> int:
        assert self.body is not None
        return self.body.size

    @property
    def lends(self) -> bool:
        """Whether another stage uses an array of this one."""
        return self.user is None

    @property
    def borrows(self) -> bool:
        """Whether the array belongs to another stage; inputs are then `Paired`."""
        return self.owner is None

    def at(self, index: int | jax.Array) -> Layer:
        assert self.body is not None
        return _tied(self.body.at(index), self.tie, self.owner, self.user)

    def scores(
        self, params: PyTree, state: PyTree, y: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        assert self.body is not None
        return self.body.scores(params, state, y, train=train, key=key)

    def lent(self, params: PyTree) -> TiedArray:
        """The array used by another stage."""
        return TiedArray(jax.tree.leaves(params)[self._position(params)])

    def add(self, gradient: PyTree, tied: TiedArray) -> PyTree:
        """Adds the gradient of the other use of the array to the stage's gradient."""
        leaves, structure = jax.tree.flatten(gradient)
        position = self._position(gradient)
        leaves[position] = leaves[position] + tied.array
        return jax.tree.unflatten(structure, leaves)

    def filled(self, params: PyTree, tied: TiedArray | None = None) -> PyTree:
        """The stage's params with the array inserted where it is used.

        Args:
          params: params of the stage.
          tied: the borrowed array; None if the stage owns it.
        """
        assert self.tie is not None
        if self.user is None:
            return params
        if tied is None:
            tied = self.lent(params)
        array = tied.array.T if self.tie.transpose else tied.array

        def borrowed(node: Any) -> bool:
            return isinstance(node, Borrowed)

        return jax.tree.map(lambda v: array if borrowed(v) else v, params, is_leaf=borrowed)

    def emptied(self, params: PyTree, tied: TiedArray | None) -> PyTree:
        """The inverse of `filled`, applied to the result of the stage's init.

        Raises:
          ValueError: the two arrays differ in shape or dtype.
        """
        assert self.tie is not None
        if self.user is None:
            self._position(params)
            return params
        leaves, structure = jax.tree.flatten(params)
        place = _place(structure, self.user, self.tie.user, self.tie.user_name)
        if tied is None and self.owner is not None:
            tied = self.lent(params)
        if tied is not None:
            ours, theirs = leaves[place], tied.array
            shape = theirs.shape[::-1] if self.tie.transpose else theirs.shape
            if (ours.shape, ours.dtype) != (shape, theirs.dtype):
                raise ValueError(
                    f"tie: layer {self.tie.owner} has {theirs.dtype}{list(theirs.shape)}, layer "
                    f"{self.tie.user} {ours.dtype}{list(ours.shape)}; both must have one array, or "
                    "with transpose=True one and its transpose"
                )
        leaves[place] = Borrowed()
        return jax.tree.unflatten(structure, leaves)

    def _position(self, params: PyTree) -> int:
        assert self.tie is not None
        assert self.owner is not None
        structure = jax.tree.structure(params)
        return _place(structure, self.owner, self.tie.owner, self.tie.name)


def tied_stages(stages: Sequence[Layer], tie: Tie | None) -> list[Layer]:
    """Wraps the stages of a tie as `Tied`.

    Args:
      stages: the network's stages.
      tie: the tied array, or None.

    Returns:
      The stages.

    Raises:
      ValueError: a layer does not exist, or belongs to a `fdg_jax.repeat`.
    """
    found, number = [], 0
    for stage in stages:
        if tie is not None:
            owner, user = (_layer(stage, number, n) for n in (tie.owner, tie.user))
            number += stage.size
            if owner is not None or user is not None:
                stage = _tied(stage, tie, owner, user)
        found.append(stage)
    if tie is not None and tie.user >= number:
        raise ValueError(f"tie: user={tie.user}, but the network has layers 0 to {number - 1}")
    return found


def emptied(stages: Sequence[Layer], params: Sequence[PyTree]) -> list[PyTree]:
    """The inverse of `untied`; uses only shapes.

    Args:
      stages: returned by `tied_stages`.
      params: params of the original network.

    Returns:
      One pytree per stage, without the borrowed array.

    Raises:
      ValueError: shapes or dtypes of the two layers differ.
    """
    tied, found = None, []
    for stage, own in zip(stages, params, strict=True):
        if isinstance(stage, Tied):
            own, tied = stage.emptied(own, tied), lent(stage, own)
        found.append(own)
    return found


def untied(stages: Sequence[Layer], params: Sequence[PyTree]) -> list[PyTree]:
    """The params of the original network, with the tied array in both layers.

    Args:
      stages: returned by `tied_stages`.
      params: params of the stages, on one device or as numpy arrays.

    Returns:
      One pytree per stage.
    """
    tied, found = None, []
    for stage, own in zip(stages, params, strict=True):
        if isinstance(stage, Tied):
            own, tied = stage.filled(own, tied), lent(stage, own)
        found.append(own)
    return found


def paired(layer: Layer, x: PyTree, tied: TiedArray | None) -> PyTree:
    """The input of a stage, paired with the tied array if it borrows one."""
    return Paired(x, tied) if borrows(layer) and tied is not None else x


def lent(layer: Layer, params: PyTree) -> TiedArray | None:
    """The tied array of a stage that lends one."""
    return layer.lent(params) if isinstance(layer, Tied) and layer.lends else None


def lends(layer: Layer) -> bool:
    """Whether another stage uses an array of this one, so that its buffers are shared."""
    return isinstance(layer, Tied) and layer.lends


def borrows(layer: Layer) -> bool:
    """Whether a stage uses an array of another stage."""
    return isinstance(layer, Tied) and layer.borrows


def _tied(body: Layer, tie: Tie | None, owner: Any, user: Any) -> Tied:
    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        value, tied = x if isinstance(x, Paired) else (x, None)
        params, state = body.init(key, value)
        return made.emptied(params, tied), state

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        value, tied = x if isinstance(x, Paired) else (x, None)
        return body.apply(made.filled(params, tied), state, value, train=train, key=key)

    made = Tied(init, apply, body=body, tie=tie, owner=owner, user=user)
    return made


def _layer(layer: Layer, number: int, wanted: int) -> tuple[Any, ...] | None:
    """Position of the params of layer ``wanted`` in those of a part of the network that begins with
    layer ``number``; None if it is not in this part."""
    if not number <= wanted < number + layer.size:
        return None
    if isinstance(layer, Headed):
        assert layer.body is not None
        return (jax.tree_util.SequenceKey(0), *(_layer(layer.body, number, wanted) or ()))
    if isinstance(layer, Chain):
        for i, inner in enumerate(layer.layers):
            rest = _layer(inner, number, wanted)
            if rest is not None:
                return (jax.tree_util.SequenceKey(i), *rest)
            number += inner.size
    if layer.size > 1:
        raise ValueError(
            f"tie: layer {wanted} is one of a repeat, whose arrays are stacked; tie layers outside "
            "of it"
        )
    return ()


@functools.cache
def _place(structure: Any, layer: tuple[Any, ...], number: int, name: str | None) -> int:
    """The index of a layer's array among the leaves of the stage's params."""
    tree = jax.tree.unflatten(structure, range(structure.num_leaves))
    found = {
        jax.tree_util.keystr(path[len(layer) :], simple=True, separator="/"): place
        for path, place in jax.tree_util.tree_leaves_with_path(tree)
        if path[: len(layer)] == layer
    }
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        raise ValueError(
            f"tie: name={name!r} is no array of layer {number}; it has "
            f"{', '.join(map(repr, found)) or 'none'}"
        )
    return found[name]
