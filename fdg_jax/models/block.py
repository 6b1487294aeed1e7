"""The blocks that residual networks are built from, in nnx."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

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
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = conv(inputs, outputs, size, stride, rngs=rngs)
        self.norm = norm(outputs, rngs=rngs)
        self.relu = relu

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(self.conv(x))
        return nnx.relu(y) if self.relu else y


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016a).

    Args:
      projection: where the shape changes, the shortcut is a 1x1 convolution with batch
        normalisation (option B); otherwise it takes every stride-th pixel and pads the new channels
        with zeros (option A), which has no parameters.
    """

    expansion = 1

    def __init__(
        self, inputs: int, width: int, stride: int = 1, *, projection: bool, rngs: nnx.Rngs
    ) -> None:
        self.first = ConvNorm(inputs, width, 3, stride, rngs=rngs)
        self.second = ConvNorm(width, width, 3, relu=False, rngs=rngs)
        self.shortcut = shortcut(inputs, width, stride, projection=projection, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.second(self.first(x)) + self.shortcut(x))


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2016a); 4 times as wide.

    The stride is in the 3x3 convolution, as in most implementations since; the paper's is in the
    first 1x1.
    """

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int = 1, *, projection: bool, rngs: nnx.Rngs
    ) -> None:
        outputs = self.expansion * width
        self.first = ConvNorm(inputs, width, 1, rngs=rngs)
        self.second = ConvNorm(width, width, 3, stride, rngs=rngs)
        self.third = ConvNorm(width, outputs, 1, relu=False, rngs=rngs)
        self.shortcut = shortcut(inputs, outputs, stride, projection=projection, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.third(self.second(self.first(x))) + self.shortcut(x))


class PreactivationBlock(nnx.Module):
    """Batch normalisation and ReLU before each 3x3 convolution (wide residual networks)."""

    def __init__(
        self, inputs: int, width: int, stride: int = 1, *, dropout: float = 0.0, rngs: nnx.Rngs
    ) -> None:
        self.norm1 = norm(inputs, rngs=rngs)
        self.conv1 = conv(inputs, width, 3, stride, rngs=rngs)
        self.norm2 = norm(width, rngs=rngs)
        self.conv2 = conv(width, width, 3, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        changes = stride != 1 or inputs != width
        self.shortcut = conv(inputs, width, 1, stride, rngs=rngs) if changes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        active = nnx.relu(self.norm1(x))
        y = nnx.relu(self.norm2(self.conv1(active)))
        if self.dropout is not None:
            y = self.dropout(y)
        return self.conv2(y) + (x if self.shortcut is None else self.shortcut(active))


class Head(nnx.Module):
    """Mean over all pixels, then one dense layer; ``norm`` puts batch norm and ReLU before it."""

    def __init__(
        self, inputs: int, num_classes: int, *, activate: bool = False, rngs: nnx.Rngs
    ) -> None:
        self.norm = norm(inputs, rngs=rngs) if activate else None
        self.dense = nnx.Linear(inputs, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.norm is not None:
            x = nnx.relu(self.norm(x))
        return self.dense(jnp.mean(x, axis=(1, 2)))


def conv(inputs: int, outputs: int, size: int, stride: int = 1, *, rngs: nnx.Rngs) -> nnx.Conv:
    """A convolution without bias, initialised for ReLU (He et al. 2015), output size / stride."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=nnx.initializers.he_normal(),
        rngs=rngs,
    )


def norm(features: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch normalisation with the running mean of the papers' framework (new value: 0.1)."""
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)


def shortcut(
    inputs: int, outputs: int, stride: int, *, projection: bool, rngs: nnx.Rngs
) -> Activation:
    """The identity where nothing changes, else option B (``projection``) or option A."""
    if stride == 1 and inputs == outputs:
        return _identity
    if projection:
        return ConvNorm(inputs, outputs, 1, stride, relu=False, rngs=rngs)
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
