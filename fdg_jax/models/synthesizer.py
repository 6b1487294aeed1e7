"""A network that predicts a stage's cotangent (decoupled neural interfaces)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdg_jax.adapters import from_nnx
from fdg_jax.layer import Layer
from fdg_jax.models import streams
from fdg_jax.models.block import ConvNorm
from fdg_jax.models.compute import DEFAULT, Compute
from fdg_jax.models.conv import Conv
from fdg_jax.typing import Key, PyTree

KINDS = ("conv", "mlp")


def synthesizer(
    kind: str = "conv", labels: int | None = None, width: int = 128, compute: Compute = DEFAULT
) -> Layer:
    r"""Predicts the cotangent of a stage's output from the output and optionally the label.

    .. math::
        \hat\delta = S(y, \; \mathrm{onehot}(c)), \qquad \hat\delta = 0 \text{ at first}

    "conv", for images: two 5x5 convolutions with batch norm and ReLU, then a 5x5 convolution.
    "mlp", for arrays of any rank: a dense layer on the last axis, ReLU, a dense layer. The last
    weights are initialised to 0.

    Args:
      kind: "conv" or "mlp".
      labels: number of classes (for tokens: size of the vocabulary); their one-hot vectors are
        additional input channels, equal at all positions of a label. None: the prediction does not
        use labels.
      width: width of the hidden layers, >= 1.
      compute: dtype and derivatives.

    Returns:
      A layer from ``(y, labels)`` to arrays of the structure, shapes and dtypes of ``y``: an array
      [B, ..., C], or streams, which are concatenated along C and split again. ``labels`` is int
      [B], or has all axes of ``y`` but the last ([B, T] for tokens); None or ignored if the
      prediction does not use labels.

    Raises:
      ValueError: another kind, labels < 1, width < 1, or (from ``init`` and ``apply``) an input of
        another shape, or without labels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer, y = synthesizer(labels=10, width=8), jnp.ones((2, 4, 4, 3))
      >>> params, state = layer.init(jax.random.key(0), (y, jnp.array([3, 7])))
      >>> delta, _ = layer.apply(params, state, (y, jnp.array([3, 7])), train=True, key=None)
      >>> delta.shape, float(abs(delta).max())
      ((2, 4, 4, 3), 0.0)

    References:
      Jaderberg et al., `Decoupled Neural Interfaces using Synthetic Gradients
      <https://arxiv.org/abs/1608.05343>`_ (DNI; with labels cDNI), the feed-forward networks of its
      supplementary material, 2017.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(KINDS)}")
    for name, value in (("labels", labels), ("width", width)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be 1 or more")
    module: Any = ConvSynthesizer if kind == "conv" else DenseSynthesizer

    @functools.cache
    def made(outputs: int) -> Layer:
        inputs = outputs + (labels or 0)
        return from_nnx(lambda rngs: module(inputs, width, outputs, compute=compute, rngs=rngs))

    def check(x: PyTree) -> tuple[PyTree, Any]:
        if not isinstance(x, tuple) or len(x) != 2:
            raise ValueError(
                f"synthesizer: its input is {type(x).__name__}; give the pair (y, labels), or "
                "(y, None)"
            )
        y, given = x
        position = streams.position("synthesizer", y)
        if kind == "conv" and len(position) != 3:
            raise ValueError(
                f"synthesizer: kind='conv' is for images [B, H, W, C], and its input is "
                f"{streams.shapes(y)}; give kind='mlp'"
            )
        if labels is None:
            return y, None
        if given is None:
            raise ValueError(
                f"synthesizer: labels={labels}, and its input has none; give (y, labels), or make "
                "it with labels=None"
            )
        if not given.shape or given.shape != position[: given.ndim]:
            raise ValueError(
                f"synthesizer: labels of shape {list(given.shape)} for an output of "
                f"{streams.shapes(y)}; give one a row [B], or one a place {list(position)}"
            )
        return y, given

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        y, _ = check(x)
        return made(sum(streams.widths(y))).init(key, None)

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        y, given = check(x)
        inputs, widths = streams.joined(y), streams.widths(y)
        if labels is not None:
            inputs = _with_labels(inputs, given, labels)
        predicted, state = made(sum(widths)).apply(params, state, inputs, train=train, key=key)
        leaves, structure = jax.tree.flatten(y)
        parts = jnp.split(predicted, np.cumsum(widths)[:-1].tolist(), axis=-1)
        like = [part.astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, like), state

    return Layer(init, apply)


class ConvSynthesizer(nnx.Module):
    """Three 5x5 convolutions with batch normalisation and ReLU; the last is initialised to 0."""

    def __init__(
        self, inputs: int, width: int, outputs: int, *, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        self.first = ConvNorm(inputs, width, 5, compute=compute, rngs=rngs)
        self.second = ConvNorm(width, width, 5, compute=compute, rngs=rngs)
        self.last = Conv(width, outputs, 5, compute=compute, rngs=rngs)
        self.last.kernel = nnx.Param(jnp.zeros((5, 5, width, outputs), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.second(self.first(x)))


class DenseSynthesizer(nnx.Module):
    """Two dense layers on the last axis with a ReLU; the second is initialised to 0."""

    def __init__(
        self, inputs: int, width: int, outputs: int, *, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        zeros = nnx.initializers.zeros_init()
        self.first = nnx.Linear(inputs, width, dtype=compute.dtype, rngs=rngs)
        self.last = nnx.Linear(width, outputs, kernel_init=zeros, dtype=compute.dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.first(x)))


def _with_labels(x: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """``x`` with one-hot labels as additional channels."""
    one_hot = jax.nn.one_hot(labels, classes, dtype=x.dtype)
    places = (1,) * (x.ndim - 1 - labels.ndim)
    channels = one_hot.reshape(*labels.shape, *places, classes)
    return jnp.concatenate([x, jnp.broadcast_to(channels, (*x.shape[:-1], classes))], axis=-1)
