"""Residual networks as lists of layers."""

from __future__ import annotations

import functools
from typing import Any

from fdg_jax.adapters import from_nnx
from fdg_jax.layer import Layer
from fdg_jax.models.block import BasicBlock, Bottleneck, ConvNorm, Head, PreactivationBlock
from fdg_jax.models.compute import DEFAULT, Compute
from fdg_jax.models.conv import Conv
from fdg_jax.repeat import repeat


def thin_resnet(
    depth: int,
    num_classes: int = 10,
    channels: int = 3,
    unroll: bool | None = None,
    compute: Compute = DEFAULT,
) -> list[Layer]:
    """The CIFAR residual network of depth 6n+2: groups of n blocks with 16, 32 and 64 channels.

    Shortcuts are option A (no parameters); global average pooling.

    Args:
      depth: 6n+2; the papers use 20, 32, 44, 56, 110 and 1202.
      num_classes: size of the output.
      channels: channels of the images.
      unroll: see `fdg_jax.repeat`.
      compute: dtype and derivatives.

    Returns:
      Layers, input first: stem, for each group its blocks, head.

    Raises:
      ValueError: depth is not 6n+2.

    Example:
      >>> len(thin_resnet(20))
      7

    References:
      He et al., `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, section 4.2, 2016.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"depth={depth}: a thin ResNet has depth 6n+2 with n >= 1 (20, 32, 44, 56)"
        )
    layers = [from_nnx(functools.partial(_stem, channels, 16, compute=compute))]
    width = 16
    for outputs, stride in ((16, 1), (32, 2), (64, 2)):
        layers += _group(
            BasicBlock,
            width,
            outputs,
            stride,
            depth // 6,
            unroll,
            projection=False,
            compute=compute,
        )
        width = outputs
    return [*layers, from_nnx(functools.partial(_head, width, num_classes, compute=compute))]


def resnet(
    depth: int,
    num_classes: int = 10,
    channels: int = 3,
    unroll: bool | None = None,
    compute: Compute = DEFAULT,
) -> list[Layer]:
    """The ImageNet residual network with a 3x3 stem for small images.

    Args:
      depth: 18, 34, 50 or 101.
      num_classes, channels, unroll, compute: as in `thin_resnet`.

    Returns:
      Layers, input first.

    Raises:
      ValueError: another depth.

    Example:
      >>> len(resnet(18))
      9

    References:
      He et al., `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, table 1, 2016.
    """
    counts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
    if depth not in counts:
        raise ValueError(f"depth={depth}: allowed are {', '.join(map(str, counts))}")
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock if depth < 50 else Bottleneck
    layers = [from_nnx(functools.partial(_stem, channels, 64, compute=compute))]
    inputs = 64
    for group, count in enumerate(counts[depth]):
        width, stride = 64 * 2**group, 1 if group == 0 else 2
        layers += _group(
            block, inputs, width, stride, count, unroll, projection=True, compute=compute
        )
        inputs = block.expansion * width
    return [*layers, from_nnx(functools.partial(_head, inputs, num_classes, compute=compute))]


def wide_resnet(
    depth: int,
    widen: int,
    num_classes: int = 10,
    channels: int = 3,
    unroll: bool | None = None,
    dropout: float = 0.0,
    compute: Compute = DEFAULT,
) -> list[Layer]:
    """The wide residual network WRN-d-k: pre-activation blocks, 16k, 32k and 64k channels.

    Args:
      depth: d = 6n+4.
      widen: k.
      num_classes, channels, unroll, compute: as in `thin_resnet`.
      dropout: rate between the two convolutions of a block, in [0, 1).

    Returns:
      Layers, input first.

    Raises:
      ValueError: depth is not 6n+4, widen < 1, or dropout is out of bounds.

    Example:
      >>> len(wide_resnet(28, 10))
      8

    References:
      Zagoruyko and Komodakis, `Wide Residual Networks <https://arxiv.org/abs/1605.07146>`_, 2016.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth={depth}: a wide ResNet has depth 6n+4 with n >= 1 (16, 28, 40)")
    if widen < 1:
        raise ValueError(f"widen={widen}: the widening factor is at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout:g}: must lie in [0, 1); 0 switches it off")
    layers = [from_nnx(functools.partial(_plain_stem, channels, 16, compute=compute))]
    width = 16
    for outputs, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
        layers += _group(
            PreactivationBlock,
            width,
            outputs,
            stride,
            depth // 6,
            unroll,
            dropout=dropout,
            compute=compute,
        )
        width = outputs
    head = functools.partial(_head, width, num_classes, activate=True, compute=compute)
    return [*layers, from_nnx(head)]


def small_resnet(
    num_classes: int = 10, channels: int = 3, compute: Compute = DEFAULT
) -> list[Layer]:
    """A residual network that trains on a CPU in minutes: 0.3 million parameters.

    A 3x3 stem with stride 2, three blocks of 32, 64 and 128 channels, head.

    Args:
      num_classes, channels, compute: as in `thin_resnet`.

    Returns:
      Five layers, input first.

    Example:
      >>> len(small_resnet())
      5
    """
    layers = [from_nnx(functools.partial(_stem, channels, 32, stride=2, compute=compute))]
    width = 32
    for outputs, stride in ((32, 1), (64, 2), (128, 2)):
        layers += _group(
            BasicBlock, width, outputs, stride, 1, None, projection=True, compute=compute
        )
        width = outputs
    return [*layers, from_nnx(functools.partial(_head, width, num_classes, compute=compute))]


def _group(
    block: Any,
    inputs: int,
    width: int,
    stride: int,
    count: int,
    unroll: bool | None,
    **options: Any,
) -> list[Layer]:
    """The first block, which changes the shape, followed by equal blocks."""
    outputs = getattr(block, "expansion", 1) * width
    first = from_nnx(lambda rngs: block(inputs, width, stride, rngs=rngs, **options))
    rest = from_nnx(lambda rngs: block(outputs, width, rngs=rngs, **options))
    if stride == 1 and inputs == outputs:
        return [repeat(rest, count, unroll=unroll)]
    return [first] + ([repeat(rest, count - 1, unroll=unroll)] if count > 1 else [])


# Factories with the argument order that `functools.partial` and `from_nnx` need.
def _stem(channels: int, outputs: int, rngs: Any, stride: int = 1, *, compute: Compute) -> ConvNorm:
    return ConvNorm(channels, outputs, 3, stride, compute=compute, rngs=rngs)


def _plain_stem(channels: int, outputs: int, rngs: Any, *, compute: Compute) -> Any:
    return Conv(channels, outputs, 3, compute=compute, rngs=rngs)


def _head(
    inputs: int, num_classes: int, rngs: Any, activate: bool = False, *, compute: Compute
) -> Head:
    return Head(inputs, num_classes, activate=activate, compute=compute, rngs=rngs)
