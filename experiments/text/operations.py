"""Operations of the transformer, with derivatives that keep little and are fast on CPU."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    r"""Attention of every position to itself and earlier positions.

    .. math::
        P = \mathrm{softmax}\left(\frac{Q K^\top}{\sqrt{d}} + M\right), \qquad Y = P V

    On GPU and TPU it is `jax.nn.dot_product_attention`.

    Args:
      q, k, v: [batch, T, heads, d], one floating dtype.

    Returns:
      Y, of the same shape and dtype.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
      >>> y = causal_attention(x, x, x)
      >>> y.shape, bool(jnp.allclose(y[:, 0], x[:, 0]))
      ((2, 3, 4, 5), True)

    References:
      Vaswani et al., `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_, section 3.2.
    """
    if jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    # With heads before positions all products are plain matrix products.
    return jnp.swapaxes(_attention(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v))), 1, 2)


_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715
_EPSILON = 1e-5


@jax.custom_vjp
def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same for [batch, heads, T, d]."""
    return _forward(q, k, v)[0]


Kept = tuple[jax.Array, ...]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Kept]:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scale = 1 / math.sqrt(q.shape[-1])
    scores = ((scale * q) @ _transposed(k)).astype(wide)
    lower = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(lower, scores, jnp.finfo(wide).min)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    # The sums divide T x d numbers instead of T x T.
    over = 1 / weights.sum(-1, keepdims=True)
    weights = weights.astype(q.dtype)
    y = ((weights @ v) * over).astype(q.dtype)
    return y, (q, k, v, weights, over, y)


def _backward(kept: Kept, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, weights, over, y = kept
    scale = 1 / math.sqrt(q.shape[-1])
    scaled = (cotangent * over).astype(q.dtype)
    common = (cotangent * y).sum(-1, keepdims=True) * over
    down = _transposed(weights) @ scaled
    scores = (weights * (scaled @ _transposed(v) - common)).astype(q.dtype)
    return scale * (scores @ k), _transposed(scores) @ (scale * q), down


_attention.defvjp(_forward, _backward)


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    r"""The Gaussian error linear unit in its approximation by tanh; keeps x alone.

    .. math::
        y = \frac{x}{2} \left(1 + \tanh\left(\sqrt{2 / \pi}\,(x + 0.044715\, x^3)\right)\right)

    Args:
      x: any shape, floating dtype.

    Returns:
      y, of the same shape and dtype.

    Example:
      >>> bool(jnp.allclose(gelu(jnp.arange(3.0)), jax.nn.gelu(jnp.arange(3.0)), atol=1e-6))
      True

    References:
      Hendrycks and Gimpel, `Gaussian Error Linear Units <https://arxiv.org/abs/1606.08415>`_, 2016.
    """
    return 0.5 * x * (1 + _tanh(x))


def _tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(_SLOPE * (x + _CUBIC * x * x * x))


def _gelu_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    t = _tanh(x)
    inner = _SLOPE * (1 + 3 * _CUBIC * x * x)
    return (cotangent * 0.5 * ((1 + t) + x * (1 - t * t) * inner),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    r"""Layer normalisation over the last axis; keeps x, and two numbers per vector.

    .. math::
        y = \gamma\, \frac{x - \mu}{\sqrt{\sigma^2 + 10^{-5}}} + \beta

    Args:
      x: [..., D], floating dtype; statistics are taken in float32 at least.
      scale: gamma, [D].
      bias: beta, [D].

    Returns:
      y, of the shape and dtype of x.

    Example:
      >>> layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.zeros(2)).round(3).tolist()
      [[-1.0, 1.0]]

    References:
      Ba et al., `Layer Normalization <https://arxiv.org/abs/1607.06450>`_, 2016.
    """
    return _norm_forward(x, scale, bias)[0]


def _norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, Kept]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(-1, keepdims=True)
    over = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + _EPSILON)
    y = ((wide - mean) * over).astype(x.dtype) * scale + bias
    return y, (x, mean, over, scale)


def _norm_backward(kept: Kept, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, over, scale = kept
    normal = (x - mean) * over
    inner = cotangent * scale
    down = inner - inner.mean(-1, keepdims=True)
    down = over * (down - normal * (inner * normal).mean(-1, keepdims=True))
    axes = tuple(range(x.ndim - 1))
    of_scale, of_bias = (cotangent * normal).sum(axes), cotangent.sum(axes)
    return down.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(scale.dtype)


layer_norm.defvjp(_norm_forward, _norm_backward)
