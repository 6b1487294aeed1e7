"""Blocks of residual networks, in nnx."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fdg_jax.models.compute import DEFAULT, Compute
from fdg_jax.models.conv import Conv
from fdg_jax.models.norm import Norm, relu

Activation = Callable[[jax.Array], jax.Array]


class ConvNorm(nnx.Module):
    """Convolution without bias, batch normalisation, and a ReLU unless ``relu=False``."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        stride: int = 1,
        *,
        relu: bool = True,
        compute: Compute = DEFAULT,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = Conv(inputs, outputs, size, stride, compute=compute, rngs=rngs)
        self.norm = Norm(outputs, relu=relu, compute=compute, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016a).

    Args:
      projection: if the shape changes, whether the shortcut is a 1x1 convolution with batch
        normalisation (option B); otherwise it takes every stride-th pixel and pads the new channels
        with zeros (option A), without parameters.
    """

    expansion = 1

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int = 1,
        *,
        projection: bool,
        compute: Compute = DEFAULT,
        rngs: nnx.Rngs,
    ) -> None:
        self.first = ConvNorm(inputs, width, 3, stride, compute=compute, rngs=rngs)
        self.activate = relu if compute.fast else nnx.relu
        self.second = ConvNorm(width, width, 3, relu=False, compute=compute, rngs=rngs)
        self.shortcut = shortcut(
            inputs, width, stride, projection=projection, compute=compute, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activate(self.second(self.first(x)) + self.shortcut(x))


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut (He et al. 2016a); 4 times as wide.

    The stride is in the 3x3 convolution, as in most implementations; in the paper it is in the
    first 1x1 convolution.
    """

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int = 1,
        *,
        projection: bool,
        compute: Compute = DEFAULT,
        rngs: nnx.Rngs,
    ) -> None:
        outputs = self.expansion * width
        self.first = ConvNorm(inputs, width, 1, compute=compute, rngs=rngs)
        self.second = ConvNorm(width, width, 3, stride, compute=compute, rngs=rngs)
        self.activate = relu if compute.fast else nnx.relu
        self.third = ConvNorm(width, outputs, 1, relu=False, compute=compute, rngs=rngs)
        self.shortcut = shortcut(
            inputs, outputs, stride, projection=projection, compute=compute, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activate(self.third(self.second(self.first(x))) + self.shortcut(x))


class PreactivationBlock(nnx.Module):
    """Batch normalisation and ReLU before each 3x3 convolution (wide residual networks)."""

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int = 1,
        *,
        dropout: float = 0.0,
        compute: Compute = DEFAULT,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = Norm(inputs, relu=True, compute=compute, rngs=rngs)
        self.conv1 = Conv(inputs, width, 3, stride, compute=compute, rngs=rngs)
        self.norm2 = Norm(width, relu=True, compute=compute, rngs=rngs)
        self.conv2 = Conv(width, width, 3, compute=compute, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        changes = stride != 1 or inputs != width
        self.shortcut = (
            Conv(inputs, width, 1, stride, compute=compute, rngs=rngs) if changes else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        active = self.norm1(x)
        y = self.norm2(self.conv1(active))
        if self.dropout is not None:
            y = self.dropout(y)
        return self.conv2(y) + (x if self.shortcut is None else self.shortcut(active))


class Head(nnx.Module):
    """Mean over all pixels and a dense layer; ``norm`` adds batch norm and ReLU before it."""

    def __init__(
        self,
        inputs: int,
        num_classes: int,
        *,
        activate: bool = False,
        compute: Compute = DEFAULT,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm = Norm(inputs, relu=True, compute=compute, rngs=rngs) if activate else None
        self.dense = nnx.Linear(inputs, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.norm is not None:
            x = self.norm(x)
        # Mean and logits are small, so they are computed in at least float32.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return self.dense(jnp.mean(x, axis=(1, 2), dtype=wide))


def shortcut(
    inputs: int,
    outputs: int,
    stride: int,
    *,
    projection: bool,
    compute: Compute = DEFAULT,
    rngs: nnx.Rngs,
) -> Activation:
    """The identity if shapes agree, else option B (``projection``) or option A."""
    if stride == 1 and inputs == outputs:
        return _identity
    if projection:
        return ConvNorm(inputs, outputs, 1, stride, relu=False, compute=compute, rngs=rngs)
    return PadShortcut(inputs, outputs, stride)


class PadShortcut(nnx.Module):
    """Every stride-th pixel, and zeros for the new channels (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        self.stride = stride
        self.padding = outputs - inputs

    def __call__(self, x: jax.Array) -> jax.Array:
        before = self.padding // 2
        sides = ((0, 0), (0, 0), (0, 0), (before, self.padding - before))
        return jnp.pad(x[:, :: self.stride, :: self.stride], sides)


def _identity(x: jax.Array) -> jax.Array:
    return x
