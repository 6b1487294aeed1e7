"""Invertible layers, whose backward needs no stored activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fdg_jax.layer import Layer, chain, output_of
from fdg_jax.typing import Key, PyTree


def coupling(branch: Layer) -> Layer:
    """A residual branch on two streams, invertible for any branch.

    .. math::
        (x, t) \\mapsto (t + F(x), \\; x), \\qquad
        (a, b) \\mapsto (b, \\; a - F(b))

    Its `reverse` evaluates F once for the inverse and the derivative.

    Args:
      branch: F; its output has the shapes and dtypes of its input.

    Returns:
      A layer from a pair to a pair, with the params and state of ``branch``.

    Raises:
      ValueError: (from ``init``) the branch changes the shape, or the input is not a pair of
        equal shapes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fdg_jax import from_fn
      >>> layer = coupling(from_fn(jnp.sin))
      >>> y, _ = layer.apply((), (), (jnp.ones(2), jnp.zeros(2)), train=True, key=None)
      >>> x, t = layer.inverse((), (), y, train=True, key=None)
      >>> x.tolist(), t.tolist()
      ([1.0, 1.0], [0.0, 0.0])

    References:
      Dinh et al., `NICE <https://arxiv.org/abs/1410.8516>`_, 2014; in this form Rivaud et al.,
      `PETRA <https://arxiv.org/abs/2406.02052>`_, section 3, 2024.
    """

    def init(key: Key, streams: PyTree) -> tuple[PyTree, PyTree]:
        if not isinstance(streams, tuple) or len(streams) != 2:
            raise ValueError(
                f"coupling: its input is {type(streams).__name__}, not a pair of streams; put a "
                "layer before it that makes two, as fdg_jax.two_streams()"
            )
        x, t = streams
        if not all(jnp.issubdtype(v.dtype, jnp.inexact) for v in jax.tree.leaves(streams)):
            raise ValueError(
                f"coupling: streams of {jax.tree.map(_signature, streams)}; they must be floating "
                "point, as only those have a gradient"
            )
        params, state = branch.init(key, x)
        shapes = [jax.tree.map(_signature, v) for v in (output_of(branch, params, state, x), x, t)]
        if shapes[0] != shapes[1] or shapes[1] != shapes[2]:
            raise ValueError(
                f"coupling: streams of {shapes[1]} and {shapes[2]}, and the branch makes "
                f"{shapes[0]}; all three must be equal"
            )
        return params, state

    def apply(
        params: PyTree, state: PyTree, streams: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        x, t = streams
        f, state = branch.apply(params, state, x, train=train, key=key)
        return (jax.tree.map(jnp.add, t, f), x), state

    def inverse(
        params: PyTree, state: PyTree, streams: PyTree, *, train: bool, key: Key | None
    ) -> PyTree:
        a, b = streams
        f, _ = branch.apply(params, state, b, train=train, key=key)
        return b, jax.tree.map(jnp.subtract, a, f)

    def reverse(
        params: PyTree, state: PyTree, streams: PyTree, cotangent: PyTree, *, key: Key | None
    ) -> tuple[PyTree, PyTree, PyTree]:
        a, b = streams
        da, db = cotangent
        f, vjp = jax.vjp(lambda p, x: branch.apply(p, state, x, train=True, key=key)[0], params, b)
        gradient, through = vjp(da)
        x = b, jax.tree.map(jnp.subtract, a, f)
        return x, gradient, (jax.tree.map(jnp.add, db, through), da)

    return Layer(init, apply, inverse, reverse)


def reversible(f: Layer, g: Layer | None = None) -> Layer:
    """A reversible residual block of one or two branches.

    .. math::
        y_1 = x_1 + F(x_2), \\qquad y_2 = x_2 + G(y_1)

    The streams are the pair (x2, x1), and after the block (y2, y1). With F alone the block is a
    `coupling`: (x2, x1) becomes (y1, x2).

    Args:
      f: F; keeps the shapes of its input.
      g: G, likewise.

    Returns:
      A layer from a pair to a pair, with an inverse; with two branches a chain of two couplings.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fdg_jax import from_fn
      >>> block = reversible(from_fn(lambda x: 2 * x), from_fn(lambda x: 3 * x))
      >>> y, _ = block.apply(((), ()), ((), ()), (1.0, 10.0), train=True, key=None)
      >>> [float(v) for v in y]
      [37.0, 12.0]

    References:
      Gomez et al., `The Reversible Residual Network <https://arxiv.org/abs/1707.04585>`_,
      equation 6, 2017.
    """
    return coupling(f) if g is None else chain([coupling(f), coupling(g)])


def two_streams() -> Layer:
    """A layer that splits the last axis of an array into two streams of half the width.

    Returns:
      A layer without parameters, with an inverse.

    Example:
      >>> import jax.numpy as jnp
      >>> x, t = two_streams().apply((), (), jnp.arange(4.0), train=True, key=None)[0]
      >>> x.tolist(), t.tolist()
      ([0.0, 1.0], [2.0, 3.0])
    """

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        first, second = jnp.split(x, 2, axis=-1)
        return (first, second), state

    def inverse(
        params: PyTree, state: PyTree, streams: PyTree, *, train: bool, key: Key | None
    ) -> PyTree:
        return jnp.concatenate(streams, axis=-1)

    return Layer(lambda key, x: ((), ()), apply, inverse)


def _signature(leaf: jax.Array) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
