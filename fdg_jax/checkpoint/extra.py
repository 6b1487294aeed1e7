"""What a run keeps in a checkpoint beside its state, such as the position of a data iterator."""

from __future__ import annotations

import base64
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.checkpoint.manifest import NAME, Damaged


def encoded(extra: Any) -> str:
    """``extra`` as text: JSON, with arrays as numbers and bytes marked as such."""
    if isinstance(extra, bytes):
        return "bytes:" + base64.b64encode(extra).decode()
    return "json:" + json.dumps(extra, default=lambda value: jax.device_get(value).tolist())


def check(extra: Any) -> None:
    """Refuses what `encoded` could not write; waits for no device.

    Raises:
      ValueError: it is neither bytes nor what JSON can hold, or JSON would change it: a key of a
        dictionary that is no text.
    """

    def array(value: Any) -> int:
        if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
            raise TypeError(f"{type(value).__name__} is not JSON")
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            raise TypeError("a typed key is not JSON; jax.random.key_data makes it numbers")
        real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
        if not real and value.dtype.kind not in "bU":
            raise TypeError(f"an array of {value.dtype} is not JSON")
        return 0

    try:
        if not isinstance(extra, bytes):
            json.dumps(extra, default=array)
            _check_names(extra)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"extra: cannot be stored ({error}); give bytes, or what JSON can hold: numbers, text, "
            "lists, dictionaries with text for keys, arrays"
        ) from error


def _check_names(value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise TypeError(f"the key {name!r} would come back as text")
            _check_names(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_names(inner)


def decoded(text: str) -> Any:
    """What `encoded` was given.

    Raises:
      Damaged: it was something else.
    """
    kind, _, rest = text.partition(":")
    try:
        return base64.b64decode(rest) if kind == "bytes" else json.loads(rest)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{NAME}: extra: {error}") from error
