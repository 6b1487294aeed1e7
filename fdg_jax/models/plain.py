"""A plain convolutional network of equal layers."""

from __future__ import annotations

import functools

from flax import nnx

from fdg_jax.adapters import from_nnx
from fdg_jax.layer import Layer
from fdg_jax.models.block import ConvNorm, Head
from fdg_jax.models.compute import DEFAULT, Compute
from fdg_jax.repeat import repeat


def plain(
    depth: int,
    width: int = 64,
    num_classes: int = 10,
    channels: int = 3,
    unroll: bool | None = None,
    compute: Compute = DEFAULT,
) -> list[Layer]:
    """A stem and ``depth`` equal 3x3 convolutions with batch norm and ReLU, without shortcuts.

    If K divides ``depth``, K stages have nearly equal costs. The network of the benchmarks.

    Args:
      depth: number of convolutions after the stem, >= 1.
      width: channels of each.
      num_classes: size of the output.
      channels: channels of the images.
      unroll: see `fdg_jax.repeat`.
      compute: dtype and derivatives.

    Returns:
      Layers, input first: stem, the repeated layer, head.

    Raises:
      ValueError: depth < 1 (from `repeat`).

    Example:
      >>> len(plain(16))
      3

    References:
      "Plain" as in He et al., `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, section 3.3, 2016.
    """
    return [
        from_nnx(functools.partial(_layer, channels, width, compute)),
        repeat(from_nnx(functools.partial(_layer, width, width, compute)), depth, unroll=unroll),
        from_nnx(functools.partial(_head, width, num_classes, compute)),
    ]


def _layer(inputs: int, outputs: int, compute: Compute, rngs: nnx.Rngs) -> ConvNorm:
    return ConvNorm(inputs, outputs, compute=compute, rngs=rngs)


def _head(inputs: int, num_classes: int, compute: Compute, rngs: nnx.Rngs) -> Head:
    return Head(inputs, num_classes, compute=compute, rngs=rngs)
