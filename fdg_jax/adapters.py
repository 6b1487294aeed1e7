"""Layers from modules of nnx, linen and Equinox, and from plain functions."""

from __future__ import annotations

import functools
from collections.abc import Callable

from flax import linen, nnx

from fdg_jax.calling import Values, convention
from fdg_jax.equinox_adapter import from_equinox, is_equinox
from fdg_jax.layer import Layer
from fdg_jax.linen_adapter import from_linen
from fdg_jax.nnx_adapter import from_nnx
from fdg_jax.typing import Key, PyTree

__all__ = ["from_equinox", "from_fn", "from_linen", "from_nnx"]


def from_fn(
    f: Callable[..., PyTree],
    *,
    train_kwargs: Values | None = None,
    eval_kwargs: Values | None = None,
) -> Layer:
    """A layer without parameters from a function of one argument.

    Args:
      f: ``f(x) -> y``, traceable by JAX. Flags with common names (``training``, ``deterministic``
        ...) are set.
      train_kwargs: flags with other names, and their values in training.
      eval_kwargs: their values in evaluation; None: inverted booleans.

    Returns:
      A `Layer` whose params and state are ``()``.

    Raises:
      ValueError: not a function; a flag that is not set, or a parameter without a default.

    Example:
      >>> import jax.numpy as jnp
      >>> from_fn(jnp.abs).apply((), (), -jnp.ones(1), train=True, key=None)[0].item()
      1.0
    """
    module = isinstance(f, (nnx.Module, linen.Module)) or is_equinox(f)
    if module or not callable(f):
        raise ValueError(
            f"f: {type(f).__name__} is no function of one argument; modules of nnx go to "
            "fdg_jax.from_nnx, those of linen to fdg_jax.from_linen, those of Equinox to "
            "fdg_jax.from_equinox"
        )
    fixed = f.keywords if isinstance(f, functools.partial) else {}
    name = getattr(f, "__name__", type(f).__name__)
    arguments = convention(f, name, train_kwargs, eval_kwargs, fixed.keys())

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        del params, key
        args, kwargs = arguments(train)
        return f(x, *args, **kwargs), state

    return Layer(lambda key, x: ((), ()), apply)
