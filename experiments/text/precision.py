"""The transformer in another floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import optax

import fdg_jax as fdg
from fdg_jax.layer import Layer
from fdg_jax.repeat import Repeat
from fdg_jax.typing import Key, PyTree


def computed_in(layers: Sequence[Layer], dtype: str) -> list[Layer]:
    """Layers that compute in ``dtype`` with float32 parameters; the last returns float32.

    Args:
      layers: of a transformer: activations take the dtype of the parameters.
      dtype: "float32" or "bfloat16".
    """
    if dtype == "float32":
        return list(layers)
    *inner, last = (_cast(layer, dtype) for layer in layers)
    return [*inner, fdg.chain([last, fdg.from_fn(lambda x: x.astype(jnp.float32))])]


def _cast(layer: Layer, dtype: str) -> Layer:
    if isinstance(layer, Repeat) and layer.layer is not None:
        return fdg.repeat(_cast(layer.layer, dtype), layer.times, unroll=layer.unroll)

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        return layer.apply(optax.tree.cast(params, dtype), state, x, train=train, key=key)

    return Layer(layer.init, apply)
