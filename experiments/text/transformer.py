"""A decoder-only transformer as a list of layers, in pure functions.

Blocks that normalise first, learned positions, GELU, and the initial weights of Radford et al.,
"Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

import fdg_jax as fdg
from fdg_jax.layer import Layer
from fdg_jax.typing import Key, PyTree

_STD = 0.02


def transformer(vocabulary: int, width: int, blocks: int, heads: int) -> list[Layer]:
    """Embedding, n equal blocks, head; `fdg_jax.partition` may cut between any two.

    Args:
      vocabulary: V, how many different tokens there are.
      width: D, of a token's vector.
      blocks: n >= 1.
      heads: of the attention; divides D.

    Returns:
      Layers that map int32 [batch, T] to logits [batch, T, V]. Position t of the output depends on
      tokens 0 to t. T is that of the example at initialisation, or less. Parameters have JAX's
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


def kernels(params: PyTree) -> PyTree:
    """True for the matrices of dense layers, which weight decay is for, False for all else."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )


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
    """Attention and a two-layer perceptron, each added to what it was given."""

    def init(key: Key, x: jax.Array) -> tuple[PyTree, PyTree]:
        width = x.shape[-1]
        keys = jax.random.split(key, 4)
        return {
            "attention_norm": _norm_params(width),
            "qkv": _dense_params(keys[0], width, 3 * width, _STD),
            "projection": _dense_params(keys[1], width, width, out_std),
            "mlp_norm": _norm_params(width),
            "expand": _dense_params(keys[2], width, 4 * width, _STD),
            "contract": _dense_params(keys[3], 4 * width, width, out_std),
        }, ()

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, train: bool, key: Key | None
    ) -> tuple[jax.Array, PyTree]:
        del train, key
        batch, length, width = x.shape
        qkv = _dense(params["qkv"], _norm(params["attention_norm"], x))
        q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, width // heads), 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + _dense(params["projection"], attended.reshape(x.shape))
        hidden = jax.nn.gelu(_dense(params["expand"], _norm(params["mlp_norm"], x)))
        return x + _dense(params["contract"], hidden), state

    return Layer(init, apply)


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
    return x @ params["kernel"] + params["bias"]


def _norm_params(width: int) -> PyTree:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _norm(params: PyTree, x: jax.Array) -> jax.Array:
    """Layer normalisation."""
    return jax.nn.standardize(x, epsilon=1e-5) * params["scale"] + params["bias"]
