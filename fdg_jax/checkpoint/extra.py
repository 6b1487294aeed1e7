"""User data in a checkpoint, such as the position of a data iterator."""

from __future__ import annotations

import base64
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.checkpoint.manifest import NAME, Damaged

# Characters in a manifest: half of the largest manifest that is read.
LARGEST = 1 << 25
_EACH = 32  # characters per number, at most


def frozen(extra: Any) -> Any:
    """An immutable copy of ``extra`` that `encoded` can write.

    Dictionaries and lists are copied, numpy arrays become numbers. JAX arrays are copied on their
    devices, without waiting.

    Args:
      extra: bytes, or JSON data and arrays.

    Returns:
      The copy.

    Raises:
      ValueError: it is neither, is too large, or would be changed by JSON, such as dictionary keys
        that are not strings.

    Example:
      >>> import numpy as np
      >>> seen = [1]
      >>> copy = frozen({"seen": seen, "rate": np.array([0.5, 0.25])})
      >>> seen.append(2)
      >>> copy
      {'seen': [1], 'rate': [0.5, 0.25]}
    """
    numbers = 0  # elements of arrays on devices

    def later(array: jax.Array) -> int:
        nonlocal numbers
        numbers += array.size
        return 0

    try:
        copy = extra if isinstance(extra, bytes) else _copy(extra)
        text = "" if isinstance(extra, bytes) else json.dumps(copy, default=later)
        decoded(f"json:{text or 0}")
    except (TypeError, ValueError, RuntimeError) as error:  # including RecursionError
        raise ValueError(
            f"extra: cannot be stored ({error}); give bytes, or what JSON can hold: numbers, text, "
            "lists, dictionaries with text for keys, arrays"
        ) from error
    # The manifest contains it as a quoted string; base64 takes four characters per three bytes.
    size = len(extra) * 4 // 3 if isinstance(extra, bytes) else len(json.dumps(text))
    if (size := size + _EACH * numbers) > LARGEST:
        raise ValueError(
            f"extra: takes {size:,} characters, and {LARGEST:,} can be read back; keep what is "
            "large in a file of its own, and its name in extra"
        )
    return copy


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"the key {name!r} would come back as text")
        return {name: _copy(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(inner) for inner in value]
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        _check_array(value)
        return jnp.copy(value) if isinstance(value, jax.Array) else value.tolist()
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} is not JSON")


def _check_array(value: Any) -> None:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError("a typed key is not JSON; jax.random.key_data makes it numbers")
    real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
    if not real and value.dtype.kind not in "bU":
        raise TypeError(f"an array of {value.dtype} is not JSON")
    if isinstance(value, jax.Array) and not (
        value.is_fully_addressable or value.is_fully_replicated
    ):
        raise TypeError("an array of which this process has a part alone is not JSON")


def encoded(copy: Any) -> str:
    """The result of `frozen` as text: JSON, or marked bytes; waits for its arrays."""
    if isinstance(copy, bytes):
        return "bytes:" + base64.b64encode(copy).decode()
    return "json:" + json.dumps(copy, default=lambda value: jax.device_get(value).tolist())


def decoded(text: str) -> Any:
    """The inverse of `encoded`.

    Raises:
      Damaged: it cannot be decoded.
    """
    kind, _, rest = text.partition(":")
    try:
        return base64.b64decode(rest) if kind == "bytes" else json.loads(rest)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{NAME}: extra: {error}") from error
