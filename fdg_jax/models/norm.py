"""Batch normalisation with ReLU that stores only what its backward needs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from fdg_jax.models.compute import DEFAULT, Compute


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float = 1e-5, relu: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Batch normalisation with the statistics of the batch, optionally followed by a ReLU.

    .. math::
        \hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, \quad y = \gamma \hat x + \beta

    Its residuals are x and y, which the neighbouring convolutions store anyway, and a few numbers
    per channel.

    Args:
      x: [..., C], any floating dtype; statistics are computed in float32 at least.
      scale: gamma, [C].
      bias: beta, [C].
      epsilon: added to the variance.
      relu: whether y is max(y, 0).

    Returns:
      y, in the dtype of ``x``; mean and variance, [C], without gradients.

    Example:
      >>> y, mean, variance = batch_norm(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.zeros(1))
      >>> y.ravel().round(3).tolist(), mean.item(), variance.item()
      ([-1.0, 1.0], 2.0, 1.0)

    References:
      Ioffe and Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, algorithm 1,
      2015.
    """
    return _forward(x, scale, bias, epsilon, relu)[0]


Kept = tuple[jax.Array, jax.Array | None, jax.Array, jax.Array, jax.Array]


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, relu: bool
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Kept]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(wide, axes)
    # One pass over x instead of two; rounding may make the difference negative.
    variance = jnp.maximum(0, jnp.mean(jnp.square(wide), axes) - jnp.square(mean))
    deviation = jax.lax.rsqrt(variance + epsilon)
    slope = scale * deviation
    y = wide * slope + (bias - mean * slope)
    y = (jnp.maximum(y, 0) if relu else y).astype(x.dtype)
    return (y, mean, variance), (x, y if relu else None, mean, deviation, scale)


def _backward(
    epsilon: float, relu: bool, kept: Kept, cotangents: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, y, mean, deviation, scale = kept
    wide = mean.dtype
    axes = tuple(range(x.ndim - 1))
    g = cotangents[0].astype(wide)
    if y is not None:
        g = jnp.where(y > 0, g, 0)
    x_wide = x.astype(wide)
    of_bias = jnp.sum(g, axes)
    # As for the variance: one pass over existing arrays instead of a new array x - mean.
    of_scale = deviation * (jnp.sum(g * x_wide, axes) - mean * of_bias)
    count = x.size // x.shape[-1]
    slope, tilt = scale * deviation, deviation * of_scale / count
    of_x = slope * (g - tilt * x_wide - (of_bias / count - tilt * mean))
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(scale.dtype)


batch_norm.defvjp(_forward, _backward)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), with a backward that uses the output, which the next layer stores anyway.

    Args:
      x: any shape and floating dtype.

    Returns:
      An array like ``x``.

    Example:
      >>> relu(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """
    return jnp.maximum(x, 0)


relu.defvjp(lambda x: (relu(x),) * 2, lambda y, g: (jnp.where(y > 0, g, 0),))


class Norm(nnx.BatchNorm):
    """Batch normalisation with PyTorch's running average (new value: 0.1).

    Args:
      features: channels.
      relu: whether a ReLU follows.
    """

    def __init__(
        self, features: int, *, relu: bool = False, compute: Compute = DEFAULT, rngs: nnx.Rngs
    ) -> None:
        super().__init__(features, momentum=0.9, epsilon=1e-5, dtype=compute.dtype, rngs=rngs)
        self.relu = relu
        self.compute = compute

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        if self.use_running_average or not self.compute.fast:
            y = super().__call__(x)
            return nnx.relu(y) if self.relu else y
        assert self.scale is not None
        assert self.bias is not None
        y, mean, variance = batch_norm(x, self.scale[...], self.bias[...], self.epsilon, self.relu)
        for running, new in ((self.mean, mean), (self.var, variance)):
            old = running[...]
            running[...] = (self.momentum * old + (1 - self.momentum) * new).astype(old.dtype)
        return y
