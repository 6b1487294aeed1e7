"""Low-precision encoding of messages between stages.

    sender's program                                 receiver's program
    ... ──► output ──► encode ──► Encoded ~~ sent ~~► decode ──► input ──► ...

Only floating-point arrays with at least one axis are encoded, and only if that saves bits per
number. The rest (tokens, masks, scalars) is sent unchanged.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fdg_jax.tie import TiedArray
from fdg_jax.typing import PyTree

ALLOWED = ("bfloat16", "float16", "int8")
LARGEST = 127  # magnitude in int8, for either sign


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["dtype"]
)
@dataclass(frozen=True)
class Encoded:
    """An array in low precision.

    Args:
      values: same shape as the array; bfloat16, float16 or int8.
      scale: float32, of the same rank, size 1 in all axes but the last; None unless values are
        int8. A vector has one scale.
      dtype: the dtype of the original and the decoded array.

    Example:
      >>> sent = encode(jnp.array([[1.0, 10.0], [-127.0, 5.0]], jnp.float32), jnp.dtype("int8"))
      >>> sent.values.tolist(), sent.values.nbytes + sent.scale.nbytes
      ([[1, 127], [-127, 64]], 12)
    """

    values: jax.Array
    scale: jax.Array | None
    dtype: np.dtype


def message_dtype(given: DTypeLike | None) -> np.dtype | None:
    """Validates the argument ``message_dtype=``.

    Args:
      given: a dtype or its name, or None.

    Returns:
      The dtype, or None if messages are not encoded.

    Raises:
      ValueError: another dtype.

    Example:
      >>> message_dtype(jnp.int8), message_dtype(None)
      (dtype('int8'), None)
    """
    if given is None:
        return None
    try:
        name = jnp.dtype(given).name
    except TypeError:
        name = repr(given)
    if name not in ALLOWED:
        raise ValueError(
            f"message_dtype={name}: allowed are {', '.join(ALLOWED)}; None sends messages as they "
            "are"
        )
    return jnp.dtype(name)


def encode(tree: PyTree, dtype: np.dtype | None) -> PyTree:
    """Encodes a message.

    A cast; int8 has one scale for each channel c, the last axis, over all rows r:

    .. math::
        s_c = \\max_r |v_{rc}| / 127, \\qquad q_{rc} = \\mathrm{round}(v_{rc} / s_c)

    The scale is 0 for a channel of zeros, and where it would be below the smallest normal float32.
    A channel with a non-finite number is decoded as non-finite.

    Args:
      tree: arrays of any shapes.
      dtype: dtype of the numbers sent; None: the tree is sent unchanged.

    Returns:
      The tree, with an `Encoded` in place of every floating-point array that has an axis and more
      bits per number than ``dtype``.

    Example:
      >>> message = {"x": jnp.ones((2, 3)), "tokens": jnp.arange(2), "rate": jnp.float32(1)}
      >>> sent = encode(message, jnp.dtype("bfloat16"))
      >>> sent["x"].values.dtype, sent["tokens"].tolist(), sent["rate"].dtype
      (dtype(bfloat16), [0, 1], dtype('float32'))
    """
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda leaf: leaf if _is_tied(leaf) else _encode(leaf, dtype), tree, is_leaf=_is_tied
    )


def decode(tree: PyTree) -> PyTree:
    """Decodes a message to the original dtypes.

    .. math::
        \\tilde v_{rc} = s_c \\, q_{rc}, \\qquad |\\tilde v_{rc} - v_{rc}| \\le s_c / 2

    up to rounding in the array's dtype.

    Args:
      tree: a result of `encode`; other leaves stay unchanged.

    Returns:
      The tree with decoded arrays.

    Example:
      >>> decode(encode(jnp.array([1.0, -3.0, 127.0]), jnp.dtype("int8"))).tolist()
      [1.0, -3.0, 127.0]
    """
    return jax.tree.map(lambda leaf: _decode(leaf) if _is_encoded(leaf) else leaf, tree, **_WHOLE)


def rounded(tree: PyTree, dtype: np.dtype | None) -> PyTree:
    """A message after encoding and decoding; its cotangent is rounded likewise.

    .. math::
        y = D(E(x)), \\qquad \\delta_x = D(E(\\delta_y))

    Args:
      tree: arrays of any shapes.
      dtype: as for `encode`.

    Returns:
      A tree of the same shapes and dtypes.

    Example:
      >>> value, pull = jax.vjp(lambda v: rounded(v, jnp.dtype("int8")), jnp.array([0.3, 127.0]))
      >>> value.tolist(), pull(jnp.array([254.0, 3.0]))[0].tolist()
      ([0.0, 127.0], [254.0, 4.0])
    """
    if dtype is None:
        return tree

    def one(leaf: jax.Array) -> jax.Array:
        return _rounded(leaf, dtype) if _narrows(leaf, dtype) else leaf

    return jax.tree.map(one, tree)


def places(tree: PyTree, values: Any, scale: Any) -> PyTree:
    """Maps the arrays of a message: values with a function, scales to a constant.

    Args:
      tree: a message, encoded or not.
      values: applied to every array, or to the values of an encoded one.
      scale: result for the scales of an encoded array, and for a tied array.

    Returns:
      A tree of the message's structure.

    Example:
      >>> places(encode(jnp.ones((2, 3)), jnp.dtype("int8")), jnp.shape, "whole").values
      (2, 3)
    """

    def one(leaf: Any) -> Any:
        if _is_tied(leaf):
            return TiedArray(scale)
        if not _is_encoded(leaf):
            return values(leaf)
        own = None if leaf.scale is None else scale
        return replace(leaf, values=values(leaf.values), scale=own)

    return jax.tree.map(one, tree, is_leaf=lambda leaf: _is_encoded(leaf) or _is_tied(leaf))


def _is_encoded(leaf: Any) -> bool:
    return isinstance(leaf, Encoded)


def _is_tied(leaf: Any) -> bool:
    return isinstance(leaf, TiedArray)


_WHOLE: dict[str, Any] = {"is_leaf": _is_encoded}


def _narrows(leaf: jax.Array, dtype: np.dtype) -> bool:
    """Whether encoding saves bits, independent of the batch size."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return floating and leaf.ndim > 0 and leaf.dtype.itemsize > dtype.itemsize


def _encode(leaf: jax.Array, dtype: np.dtype) -> jax.Array | Encoded:
    if not _narrows(leaf, dtype):
        return leaf
    if dtype != jnp.int8:
        return Encoded(leaf.astype(dtype), None, leaf.dtype)
    wide = leaf.astype(_wide(leaf.dtype))
    rows = tuple(range(max(leaf.ndim - 1, 1)))
    largest = jnp.max(jnp.abs(wide), axis=rows, keepdims=True, initial=0)
    scale = (largest / LARGEST).astype(jnp.float32)
    # This comparison is false for NaN, so NaN is kept.
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0, scale)
    quotient = wide / jnp.where(scale == 0, 1, scale).astype(wide.dtype)
    values = jnp.clip(jnp.round(quotient), -LARGEST, LARGEST).astype(jnp.int8)
    return Encoded(values, scale, leaf.dtype)


def _decode(sent: Encoded) -> jax.Array:
    if sent.scale is None:
        return sent.values.astype(sent.dtype)
    wide = _wide(sent.dtype)
    product: jax.Array = sent.values.astype(wide) * sent.scale.astype(wide)
    return product.astype(sent.dtype)


def _wide(dtype: np.dtype) -> np.dtype:
    return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounded(leaf: jax.Array, dtype: np.dtype) -> jax.Array:
    # Without the barrier XLA may eliminate a cast followed by its inverse.
    arrived: jax.Array = decode(jax.lax.optimization_barrier(_encode(leaf, dtype)))
    return arrived


_rounded.defvjp(
    lambda leaf, dtype: (_rounded(leaf, dtype), None),
    lambda dtype, _, cotangent: (_rounded(cotangent, dtype),),
)
