"""Auxiliary classifiers that give a stage its own loss (decoupled greedy learning)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from fdg_jax.adapters import from_fn, from_nnx
from fdg_jax.layer import Layer, chain
from fdg_jax.models import streams
from fdg_jax.models.block import ConvNorm
from fdg_jax.models.compute import DEFAULT, Compute
from fdg_jax.models.norm import Norm
from fdg_jax.typing import Key, PyTree

KINDS = ("mlp-sr", "mlp")


def auxiliary_head(
    num_classes: int = 10, kind: str = "mlp-sr", compute: Compute = DEFAULT
) -> Layer:
    """A classifier on a stage's output, for a loss independent of later stages.

    Images are pooled to a quarter of their height and width (means, rounded up) and pass three 1x1
    convolutions; they are pooled to 2x2 and pass three dense layers of 4C, and a last one. Batch
    norm and ReLU follow all but the last. Tokens and vectors pass a layer norm and a dense layer,
    for both kinds.

    Args:
      num_classes: size of the output, >= 1.
      kind: "mlp-sr", or "mlp" without the convolutions.
      compute: dtype and derivatives.

    Returns:
      A layer from images [B, H, W, C] or vectors [B, C] to logits [B, num_classes], or from tokens
      [B, T, C] to [B, T, num_classes], in float32 at least. Pairs of streams are concatenated
      along C.

    Raises:
      ValueError: another kind, num_classes < 1, or (from ``init`` and ``apply``) an input of
        another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> head, y = auxiliary_head(num_classes=3), jnp.ones((2, 8, 8, 4))
      >>> params, state = head.init(jax.random.key(0), y)
      >>> head.apply(params, state, y, train=True, key=None)[0].shape
      (2, 3)

    References:
      Belilovsky et al., `Decoupled Greedy Learning of CNNs <https://arxiv.org/abs/1901.08164>`_,
      MLP-SR-aux and MLP-aux, 2020.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(KINDS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: must be 1 or more")

    # Cached, because every layer determines its module's structure once.
    @functools.cache
    def made(width: int, image: bool) -> Layer:
        if not image:
            return from_nnx(lambda rngs: Logits(width, num_classes, norm=True, rngs=rngs))
        conv = from_nnx(lambda rngs: ConvNorm(width, width, 1, compute=compute, rngs=rngs))
        dense = from_nnx(lambda rngs: DenseNorm(4 * width, compute=compute, rngs=rngs))
        logits = from_nnx(lambda rngs: Logits(4 * width, num_classes, rngs=rngs))
        convs = [conv] * 3 if kind == "mlp-sr" else []
        return chain([from_fn(_quarter), *convs, from_fn(_flat), *[dense] * 3, logits])

    def layer(x: PyTree) -> Layer:
        rank = len(streams.position("auxiliary_head", x)) + 1
        if rank not in (2, 3, 4):
            raise ValueError(
                f"auxiliary_head: its input has {rank} axes, {streams.shapes(x)}; give images "
                "[B, H, W, C], tokens [B, T, C] or vectors [B, C]"
            )
        return made(sum(streams.widths(x)), rank == 4)

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        return layer(x).init(key, jax.eval_shape(streams.joined, x))

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        return layer(x).apply(params, state, streams.joined(x), train=train, key=key)

    return Layer(init, apply)


class DenseNorm(nnx.Module):
    """A dense layer as wide as its input, batch normalisation and ReLU."""

    def __init__(self, width: int, *, compute: Compute = DEFAULT, rngs: nnx.Rngs) -> None:
        # Batch normalisation would cancel a bias.
        self.dense = nnx.Linear(width, width, use_bias=False, dtype=compute.dtype, rngs=rngs)
        self.norm = Norm(width, relu=True, compute=compute, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.dense(x))


class Logits(nnx.Module):
    """A dense layer in at least float32; ``norm`` adds a layer normalisation before it."""

    def __init__(
        self, inputs: int, num_classes: int, *, norm: bool = False, rngs: nnx.Rngs
    ) -> None:
        self.norm = nnx.LayerNorm(inputs, epsilon=1e-5, rngs=rngs) if norm else None
        self.dense = nnx.Linear(inputs, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return self.dense(x if self.norm is None else self.norm(x))


def mean_pool(x: jax.Array, height: int, width: int) -> jax.Array:
    """Means over windows that cover an image evenly, ``height`` rows by ``width`` columns.

    Args:
      x: images, [B, H, W, C]; a window begins at pixel ``i * H // height``, and ends before
        ``ceil((i + 1) * H / height)``.

    Returns:
      [B, height, width, C].

    Example:
      >>> mean_pool(jnp.arange(3.0).reshape(1, 3, 1, 1), 2, 1).ravel().tolist()
      [0.5, 1.5]
    """
    for axis, size in ((1, height), (2, width)):
        pixels = x.shape[axis]
        if pixels % size == 0:
            parts = x.reshape(*x.shape[:axis], size, pixels // size, *x.shape[axis + 1 :])
            x = parts.mean(axis + 1)
        else:
            edges = [(i * pixels // size, -(-(i + 1) * pixels // size)) for i in range(size)]
            means = [jax.lax.slice_in_dim(x, a, b, axis=axis).mean(axis) for a, b in edges]
            x = jnp.stack(means, axis)
    return x


def _quarter(x: jax.Array) -> jax.Array:
    return mean_pool(x, math.ceil(x.shape[1] / 4), math.ceil(x.shape[2] / 4))


def _flat(x: jax.Array) -> jax.Array:
    return mean_pool(x, 2, 2).reshape(len(x), -1)
