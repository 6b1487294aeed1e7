"""A decoder-only transformer, and a reversible one, as lists of layers in pure functions.

Pre-norm blocks, learned positions, GELU, and the initialisation of Radford et al., "Language Models
are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

import fdg_jax as fdg
from experiments.text.operations import causal_attention, gelu, layer_norm
from fdg_jax.layer import Layer
from fdg_jax.typing import Key, PyTree

_STD = 0.02


def transformer(vocabulary: int, width: int, blocks: int, heads: int) -> list[Layer]:
    """Embedding, n equal blocks, head; `fdg_jax.partition` may cut between any two.

    Args:
      vocabulary: V, the number of distinct tokens.
      width: D, the size of a token's vector.
      blocks: n >= 1.
      heads: number of attention heads; divides D.

    Returns:
      Layers that map int32 [batch, T] to logits [batch, T, V]. Position t of the output depends on
      tokens 0 to t. T is at most that of the example at initialisation. Parameters have JAX's
      default float dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> network = fdg.chain(transformer(vocabulary=5, width=8, blocks=2, heads=2))
      >>> tokens = jnp.zeros((3, 4), jnp.int32)
      >>> params, state = network.init(jax.random.key(0), tokens)
      >>> network.apply(params, state, tokens, train=False, key=None)[0].shape
      (3, 4, 5)
    """
    repeated = fdg.repeat(_block(heads, _STD / math.sqrt(2 * blocks)), blocks)
    return [_embedding(vocabulary, width), repeated, _head(vocabulary)]


def reversible_transformer(vocabulary: int, width: int, blocks: int, heads: int) -> list[Layer]:
    r"""The transformer on two streams, with invertible blocks.

    .. math::
        y_1 = x_1 + \mathrm{attention}(x_2), \qquad y_2 = x_2 + \mathrm{perceptron}(y_1)

    Both streams start as the embedding; the head reads their mean. A block has the same parameters
    as in `transformer`.

    Args:
      vocabulary, width, blocks, heads: as in `transformer`; each stream has the width.

    Returns:
      Layers with the same input and output as `transformer`; they exchange pairs of arrays.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> network = fdg.chain(reversible_transformer(vocabulary=5, width=8, blocks=2, heads=2))
      >>> tokens = jnp.zeros((3, 4), jnp.int32)
      >>> params, state = network.init(jax.random.key(0), tokens)
      >>> network.apply(params, state, tokens, train=False, key=None)[0].shape
      (3, 4, 5)

    References:
      Kitaev et al., `Reformer <https://arxiv.org/abs/2001.04451>`_, section 3, 2020.
    """
    std = _STD / math.sqrt(2 * blocks)
    attention = _branch(
        lambda keys, width: _attention_params(keys, width, std),
        lambda params, x: _attention(params, x, heads),
    )
    perceptron = _branch(lambda keys, width: _perceptron_params(keys, width, std), _perceptron)
    return [
        fdg.chain([_embedding(vocabulary, width), fdg.from_fn(lambda x: (x, x))]),
        fdg.repeat(fdg.reversible(attention, perceptron), blocks),
        fdg.chain([fdg.from_fn(lambda streams: (streams[0] + streams[1]) / 2), _head(vocabulary)]),
    ]


def _embedding(vocabulary: int, width: int) -> Layer:
    def init(key: Key, x: jax.Array) -> tuple[PyTree, PyTree]:
        token, position = jax.random.split(key)
        return {
            "token": _STD * jax.random.normal(token, (vocabulary, width)),
            "position": _STD * jax.random.normal(position, (x.shape[1], width)),
        }, ()

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, train: bool, key: Key | None
    ) -> tuple[jax.Array, PyTree]:
        del train, key
        return params["token"][x] + params["position"][: x.shape[1]], state

    return Layer(init, apply)


def _block(heads: int, out_std: float) -> Layer:
    """Attention and a two-layer perceptron, each with a residual connection."""

    def init(key: Key, x: jax.Array) -> tuple[PyTree, PyTree]:
        width, keys = x.shape[-1], jax.random.split(key, 4)
        return {
            **_attention_params(keys[:2], width, out_std),
            **_perceptron_params(keys[2:], width, out_std),
        }, ()

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, train: bool, key: Key | None
    ) -> tuple[jax.Array, PyTree]:
        del train, key
        x = x + _attention(params, x, heads)
        return x + _perceptron(params, x), state

    return Layer(init, apply)


def _branch(
    init: Callable[[Key, int], PyTree], apply: Callable[[PyTree, jax.Array], jax.Array]
) -> Layer:
    """A part of a block as a layer; ``init`` gets two keys and the width."""
    return Layer(
        lambda key, x: (init(jax.random.split(key), x.shape[-1]), ()),
        lambda params, state, x, *, train, key: (apply(params, x), state),
    )


def _attention_params(keys: Key, width: int, out_std: float) -> PyTree:
    return {
        "attention_norm": _norm_params(width),
        "qkv": _dense_params(keys[0], width, 3 * width, _STD),
        "projection": _dense_params(keys[1], width, width, out_std),
    }


def _attention(params: PyTree, x: jax.Array, heads: int) -> jax.Array:
    batch, length, width = x.shape
    qkv = _dense(params["qkv"], _norm(params["attention_norm"], x))
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, width // heads), 2, 0)
    attended = causal_attention(q, k, v)
    return _dense(params["projection"], attended.reshape(x.shape))


def _perceptron_params(keys: Key, width: int, out_std: float) -> PyTree:
    return {
        "mlp_norm": _norm_params(width),
        "expand": _dense_params(keys[0], width, 4 * width, _STD),
        "contract": _dense_params(keys[1], 4 * width, width, out_std),
    }


def _perceptron(params: PyTree, x: jax.Array) -> jax.Array:
    hidden = gelu(_dense(params["expand"], _norm(params["mlp_norm"], x)))
    return _dense(params["contract"], hidden)


def _head(vocabulary: int) -> Layer:
    def init(key: Key, x: jax.Array) -> tuple[PyTree, PyTree]:
        width = x.shape[-1]
        dense = _dense_params(key, width, vocabulary, _STD)
        return {"norm": _norm_params(width), "logits": dense}, ()

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, train: bool, key: Key | None
    ) -> tuple[jax.Array, PyTree]:
        del train, key
        return _dense(params["logits"], _norm(params["norm"], x)), state

    return Layer(init, apply)


def _dense_params(key: Key, inputs: int, outputs: int, std: float) -> PyTree:
    kernel = std * jax.random.normal(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def _dense(params: PyTree, x: jax.Array) -> jax.Array:
    # With one axis of rows the kernel's gradient is a plain matrix product, which XLA computes much
    # faster on CPU.
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ params["kernel"]).reshape(*x.shape[:-1], -1) + params["bias"]


def _norm_params(width: int) -> PyTree:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _norm(params: PyTree, x: jax.Array) -> jax.Array:
    """Layer normalisation."""
    return layer_norm(x, params["scale"], params["bias"])
