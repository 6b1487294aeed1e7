"""Checks of layers; errors name the layer, its input and the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from fdg_jax.typing import PyTree


class LayerError(ValueError):
    """A layer failed or does not fit the previous layer; the message gives both numbers."""


def check_layers(layers: Any, name: str = "layers") -> list[Any]:
    """Rejects anything but a list of layers.

    Args:
      layers: the argument to check.
      name: its name.

    Returns:
      The layers as a list.

    Raises:
      ValueError: not a list, or an element is not a layer; the message says how to make one.

    Example:
      >>> check_layers([len])
      Traceback (most recent call last):
      ...
      ValueError: layers[0]: a function is no layer; make one with fdg_jax.from_fn(f)
    """
    if is_layer(layers) or isinstance(layers, (str, bytes)) or not hasattr(layers, "__iter__"):
        raise ValueError(
            f"{name}: {_what(layers)} is no list of layers; give a list, such as [layer, layer]"
        )
    found = list(layers)
    for i, one in enumerate(found):
        check_layer(one, f"{name}[{i}]")
    return found


def check_layer(layer: Any, name: str = "layer") -> None:
    """Rejects anything but a layer.

    Args:
      layer: the argument to check.
      name: its name.

    Raises:
      ValueError: the message says how to make a layer of it.
    """
    if is_layer(layer):
        return
    cls = layer if isinstance(layer, type) else type(layer)
    kind, modules = cls.__name__, [base.__module__ for base in cls.__mro__]
    if any(module.startswith("flax.nnx") for module in modules):
        remedy = f"make one with fdg_jax.from_nnx(lambda rngs: {kind}(..., rngs=rngs))"
    elif any(module.startswith("flax.linen") for module in modules):
        remedy = f"make one with fdg_jax.from_linen({kind}(...))"
    elif any(module.startswith("equinox") for module in modules):
        remedy = f"make one with fdg_jax.from_equinox(lambda key: {kind}(..., key=key))"
    elif isinstance(layer, (list, tuple)):
        remedy = "make one with fdg_jax.chain(layers)"
    elif callable(layer):
        remedy = "make one with fdg_jax.from_fn(f)"
    else:
        remedy = "make one with fdg_jax.Layer(init, apply)"
    raise ValueError(f"{name}: {_what(layer)} is no layer; {remedy}")


def is_layer(value: Any) -> bool:
    """Whether a value has the attributes of a layer."""
    return all(callable(getattr(value, name, None)) for name in ("init", "apply", "at"))


@contextlib.contextmanager
def naming(index: Any, x: PyTree) -> Iterator[None]:
    """Adds the layer's number and input to its errors.

    Args:
      index: the number; a traced number (of a repeated layer) is not shown.
      x: its input; only shapes and dtypes are used.

    Raises:
      LayerError: replaces errors of types, shapes and values.
    """
    try:
        yield
    except LayerError:
        raise
    except Exception as error:
        named = isinstance(error, (TypeError, ValueError, LookupError, AttributeError))
        if not named and not type(error).__module__.startswith("flax"):
            raise
        number = isinstance(index, int)
        layer = f"layer {index}" if number else "a repeated layer"
        source = f"what layer {index - 1} gives" if number and index else "the inputs"
        source = source if number else "its input"
        raise LayerError(
            f"{layer}: fails on {source}, {shapes(x)}: {type(error).__name__}: {error}"
        ) from error


def pair_of(index: Any, what: str, made: Any) -> tuple[PyTree, PyTree]:
    """The two values that a layer's function returns.

    Args:
      index: the layer's number.
      what: the function and its required result, for the message.
      made: its result.

    Raises:
      LayerError: not two values.
    """
    if isinstance(made, (tuple, list)) and len(made) == 2:
        return made[0], made[1]
    layer = f"layer {index}" if isinstance(index, int) else "a repeated layer"
    many = f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
    raise LayerError(f"{layer}: its {what}, not {_what(made)}{many}")


def shapes(tree: PyTree) -> str:
    """Shapes and dtypes, for a message.

    Example:
      >>> import numpy as np
      >>> shapes((np.ones((2, 3)), {"mask": np.ones(2, bool)}))
      "(float64[2,3], {'mask': bool[2]})"
    """

    class Text(str):
        def __repr__(self) -> str:
            return str(self)

    def one(leaf: Any) -> Text:
        if not hasattr(leaf, "dtype"):
            return Text(type(leaf).__name__)
        return Text(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")

    return str(jax.tree.map(one, tree))


def _what(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if type(value).__name__ in ("function", "builtin_function_or_method", "PjitFunction"):
        return "a function"
    return type(value).__name__
