"""Reversible residual networks as lists of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdg_jax.adapters import from_fn, from_nnx
from fdg_jax.layer import Layer, chain
from fdg_jax.models.block import ConvNorm, Head
from fdg_jax.models.compute import DEFAULT, Compute
from fdg_jax.models.norm import relu
from fdg_jax.repeat import repeat
from fdg_jax.reversible import coupling, two_streams

Streams = tuple[jax.Array, jax.Array]


def revnet(
    depth: int,
    num_classes: int = 10,
    channels: int = 3,
    unroll: bool | None = None,
    compute: Compute = DEFAULT,
) -> list[Layer]:
    r"""The reversible version of `resnet`: two streams, each of the ResNet's width.

    .. math::
        (x, t) \mapsto (t + F(x), \; x)

    F consists of convolutions with batch norm and ReLU, two 3x3 (18, 34) or 1x1, 3x3 and 1x1 (50);
    nothing follows the sum. Blocks that halve the image or widen the streams have no inverse. The
    head pools both streams.

    Args:
      depth: 18, 34 or 50.
      num_classes: size of the output.
      channels: channels of the images.
      unroll: see `fdg_jax.repeat`.
      compute: dtype and derivatives.

    Returns:
      Layers, input first. The first splits the stem's output in two; the layers exchange pairs of
      arrays.

    Raises:
      ValueError: another depth.

    Example:
      >>> from fdg_jax.partition import units_of
      >>> layers = revnet(18)
      >>> len(units_of(layers)), sum(layer.inverse is not None for layer in units_of(layers))
      (10, 5)

    References:
      Gomez et al., `The Reversible Residual Network <https://arxiv.org/abs/1707.04585>`_, 2017;
      in this form Rivaud et al., `PETRA <https://arxiv.org/abs/2406.02052>`_, section 4, 2024.
    """
    counts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
    if depth not in counts:
        raise ValueError(f"depth={depth}: allowed are {', '.join(map(str, counts))}")
    widths = (64, 128, 256, 512)
    bottleneck = depth >= 50
    return _network(widths, counts[depth], bottleneck, 1, num_classes, channels, unroll, compute)


def small_revnet(
    num_classes: int = 10, channels: int = 3, compute: Compute = DEFAULT
) -> list[Layer]:
    """A reversible network that trains on a CPU in minutes: 0.3 million parameters.

    A 3x3 stem with stride 2; 4, 5 and 3 blocks on streams of 16, 32 and 64 channels; head. The
    first blocks with 32 and 64 channels have no inverse.

    Args:
      num_classes, channels, compute: as in `revnet`.

    Returns:
      Layers, input first; 14 between which `partition` may cut.

    Example:
      >>> from fdg_jax.partition import units_of
      >>> len(units_of(small_revnet()))
      14
    """
    return _network((16, 32, 64), (4, 5, 3), False, 2, num_classes, channels, None, compute)


def _network(
    widths: Sequence[int],
    counts: Sequence[int],
    bottleneck: bool,
    stride: int,
    num_classes: int,
    channels: int,
    unroll: bool | None,
    compute: Compute,
) -> list[Layer]:
    """Stem (with that stride), a group of blocks for each width, head."""
    inputs = widths[0]
    layers = [_stem(channels, 2 * inputs, stride, compute)]
    for group, (width, count) in enumerate(zip(widths, counts, strict=True)):
        outputs = 4 * width if bottleneck else width
        step = 1 if group == 0 else 2
        if step > 1 or inputs != outputs:
            layers.append(_transition(bottleneck, inputs, width, step, compute))
            count -= 1
        layers.append(repeat(_block(bottleneck, outputs, width, compute), count, unroll=unroll))
        inputs = outputs
    return [*layers, _head(2 * inputs, num_classes, compute)]


# Separate functions, so that each factory captures its own sizes.
def _stem(channels: int, outputs: int, stride: int, compute: Compute) -> Layer:
    def stem(rngs: nnx.Rngs) -> ConvNorm:
        return ConvNorm(channels, outputs, 3, stride, compute=compute, rngs=rngs)

    return chain([from_nnx(stem), two_streams()])


def _block(bottleneck: bool, inputs: int, width: int, compute: Compute) -> Layer:
    branch: Any = BottleneckBranch if bottleneck else BasicBranch
    return coupling(from_nnx(lambda rngs: branch(inputs, width, compute=compute, rngs=rngs)))


def _transition(bottleneck: bool, inputs: int, width: int, stride: int, compute: Compute) -> Layer:
    module: Any = BottleneckTransition if bottleneck else BasicTransition
    return from_nnx(lambda rngs: module(inputs, width, stride, compute=compute, rngs=rngs))


def _head(inputs: int, num_classes: int, compute: Compute) -> Layer:
    def head(rngs: nnx.Rngs) -> Head:
        return Head(inputs, num_classes, compute=compute, rngs=rngs)

    return chain([from_fn(lambda streams: jnp.concatenate(streams, axis=-1)), from_nnx(head)])


class BasicBranch(nnx.Module):
    """F of a basic block: two 3x3 convolutions, each with batch normalisation and ReLU."""

    def __init__(
        self, inputs: int, width: int, *, compute: Compute = DEFAULT, rngs: nnx.Rngs
    ) -> None:
        self.first = ConvNorm(inputs, width, compute=compute, rngs=rngs)
        self.second = ConvNorm(width, width, compute=compute, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x))


class BottleneckBranch(nnx.Module):
    """F of a bottleneck: 1x1, 3x3 and 1x1 convolutions, each with batch normalisation and ReLU.

    The output is 4 times as wide as the 3x3 convolution, which has the stride.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int = 1,
        *,
        compute: Compute = DEFAULT,
        rngs: nnx.Rngs,
    ) -> None:
        self.first = ConvNorm(inputs, width, 1, compute=compute, rngs=rngs)
        self.second = ConvNorm(width, width, 3, stride, compute=compute, rngs=rngs)
        self.third = ConvNorm(width, 4 * width, 1, compute=compute, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.third(self.second(self.first(x)))


class BasicTransition(nnx.Module):
    """The first basic block of a group: halves the images of both streams and widens the streams.

    The second stream is the output of F's first convolution and batch normalisation on x, before
    the ReLU.
    """

    def __init__(
        self, inputs: int, width: int, stride: int, *, compute: Compute = DEFAULT, rngs: nnx.Rngs
    ) -> None:
        self.first = ConvNorm(inputs, width, 3, stride, relu=False, compute=compute, rngs=rngs)
        self.activate = relu if compute.fast else nnx.relu
        self.second = ConvNorm(width, width, compute=compute, rngs=rngs)
        self.shortcut = ConvNorm(inputs, width, 1, stride, relu=False, compute=compute, rngs=rngs)

    def __call__(self, streams: Streams) -> Streams:
        x, t = streams
        reduced = self.first(x)
        return self.second(self.activate(reduced)) + self.shortcut(t), reduced


class BottleneckTransition(nnx.Module):
    """The first bottleneck of a group: each stream has its own 1x1 convolution beside F."""

    def __init__(
        self, inputs: int, width: int, stride: int, *, compute: Compute = DEFAULT, rngs: nnx.Rngs
    ) -> None:
        outputs = 4 * width
        self.branch = BottleneckBranch(inputs, width, stride, compute=compute, rngs=rngs)
        self.of_t = ConvNorm(inputs, outputs, 1, stride, relu=False, compute=compute, rngs=rngs)
        self.of_x = ConvNorm(inputs, outputs, 1, stride, relu=False, compute=compute, rngs=rngs)

    def __call__(self, streams: Streams) -> Streams:
        x, t = streams
        return self.branch(x) + self.of_t(t), self.of_x(x)
