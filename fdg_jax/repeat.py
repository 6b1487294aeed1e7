"""Repetitions of one layer, which compile once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fdg_jax.layer import Layer, output_of
from fdg_jax.layer_check import check_layer
from fdg_jax.typing import Key, PyTree


@dataclass(frozen=True)
class Repeat(Layer):
    """A repetition of one layer; made by `repeat`."""

    layer: Layer | None = None
    times: int = 1
    unroll: bool | None = None

    @property
    def size(self) -> int:
        assert self.layer is not None
        return self.times * self.layer.size

    def at(self, index: int | jax.Array) -> Layer:
        return self.of(self.times, first=index)

    def of(self, times: int, *, first: int | jax.Array = 0) -> Layer:
        """The same layer, repeated another number of times."""
        assert self.layer is not None
        return repeat(self.layer, times, unroll=self.unroll, first=first)


def repeat(
    layer: Layer, n: int, *, unroll: bool | None = None, first: int | jax.Array = 0
) -> Layer:
    """Repeats a layer n times with separate parameters; `partition` may cut between any two.

    Args:
      layer: a layer whose output has the shapes and dtypes of its input.
      n: the number of repetitions, >= 1.
      unroll: True unrolls the n layers, False compiles one layer inside ``lax.scan``. None unrolls
        on CPU, where XLA runs convolutions inside a loop 6 to 16 times slower, and scans on GPU and
        TPU to limit compile time.
      first: the number of the first repetition in the whole network.

    Returns:
      A layer whose params and state are those of ``layer`` with a new leading axis of length n,
      independent of ``unroll``.

    Raises:
      ValueError: n < 1, not a layer, or (from ``init``) the layer changes the shape of its input.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> double = Layer(lambda key, x: (jnp.float32(2), ()),
      ...                lambda p, s, x, *, train, key: (p * x, s))
      >>> net = repeat(double, 3)
      >>> params, state = net.init(jax.random.key(0), jnp.ones(1))
      >>> params.shape, net.apply(params, state, jnp.ones(1), train=False, key=None)[0].item()
      ((3,), 8.0)
    """
    check_layer(layer)
    if n < 1:
        raise ValueError(f"n={n}: a layer is repeated at least once")

    # One compiled program for all, so that initial weights are bitwise independent of the cuts.
    init_one = jax.jit(lambda key, index, x: layer.at(index).init(key, x))

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        parts = [init_one(key, jnp.uint32(first + i * layer.size), x) for i in range(n)]
        params, state = parts[0]
        y = output_of(layer.at(first), params, state, x)
        if jax.tree.map(_signature, y) != jax.tree.map(_signature, x):
            raise ValueError(
                f"layer: a repeated layer must keep its input's shape, but it maps "
                f"{jax.tree.map(_signature, x)} to {jax.tree.map(_signature, y)}; "
                "put the layer that changes the shape outside of `repeat`"
            )
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        if _unrolls(unroll):
            new_state = []
            for i, (p, s) in enumerate(zip(_unstack(params, n), _unstack(state, n), strict=True)):
                x, s = layer.at(first + i * layer.size).apply(p, s, x, train=train, key=key)
                new_state.append(s)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new_state)

        def body(x: PyTree, one: tuple[PyTree, PyTree, jax.Array]) -> tuple[PyTree, PyTree]:
            p, s, i = one
            return layer.at(first + i * layer.size).apply(p, s, x, train=train, key=key)

        return jax.lax.scan(body, x, (params, state, jnp.arange(n)))

    def inverse(
        params: PyTree, state: PyTree, y: PyTree, *, train: bool, key: Key | None
    ) -> PyTree:
        def body(y: PyTree, one: tuple[PyTree, PyTree, jax.Array]) -> tuple[PyTree, None]:
            p, s, i = one
            own = layer.at(first + i * layer.size)
            assert own.inverse is not None
            return own.inverse(p, s, y, train=train, key=key), None

        return backwards(body, y, params, state)[0]

    def reverse(
        params: PyTree, state: PyTree, y: PyTree, cotangent: PyTree, *, key: Key | None
    ) -> tuple[PyTree, PyTree, PyTree]:
        def body(
            at: tuple[PyTree, PyTree], one: tuple[PyTree, PyTree, jax.Array]
        ) -> tuple[tuple[PyTree, PyTree], PyTree]:
            p, s, i = one
            own = layer.at(first + i * layer.size)
            assert own.reverse is not None
            y, gradient, cotangent = own.reverse(p, s, *at, key=key)
            return (y, cotangent), gradient

        (x, cotangent), gradient = backwards(body, (y, cotangent), params, state)
        return x, gradient, cotangent

    def backwards(body: Any, carry: PyTree, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        """Scans from the last layer to the first; unrolled if `apply` is."""
        if not _unrolls(unroll):
            return jax.lax.scan(body, carry, (params, state, jnp.arange(n)), reverse=True)
        made = []
        layers = zip(_unstack(params, n), _unstack(state, n), range(n), strict=True)
        for one in reversed(list(layers)):
            carry, out = body(carry, one)
            made.append(out)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *reversed(made))

    if layer.inverse is None:
        return Repeat(init, apply, layer=layer, times=n, unroll=unroll)
    return Repeat(init, apply, inverse, reverse, layer, n, unroll)


def _unrolls(unroll: bool | None) -> bool:
    return jax.default_backend() == "cpu" if unroll is None else unroll


def _signature(leaf: jax.Array) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _unstack(tree: PyTree, n: int) -> list[PyTree]:
    # A single split has one concatenation as derivative; n slices would have n padded sums.
    leaves, structure = jax.tree.flatten(tree)
    parts = [jax.lax.split(leaf, [1] * n) for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[i][0] for part in parts]) for i in range(n)]
