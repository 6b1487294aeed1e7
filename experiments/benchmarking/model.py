"""A network with batch and loss, by name: the project's, or returned by the user's function."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import fdg_jax as fdg
from experiments.common.errors import UsageError
from experiments.text.transformer import transformer
from experiments.training.config import blame
from experiments.training.task import loss_fn
from fdg_jax.layer import Layer
from fdg_jax.layer_check import check_layers
from fdg_jax.typing import LossFn, PyTree

CLASSES, CHANNELS, VOCABULARY = 10, 3, 256
RETURNS = "return (layers, (inputs, labels)) or (layers, (inputs, labels), loss_fn)"


@dataclass(frozen=True)
class Model:
    """The parts of a training step except the optimizer.

    Attributes:
      layers: input first.
      batch: inputs and labels, arrays.
      loss_fn: the loss function, or None.
    """

    layers: Sequence[Layer]
    batch: tuple[PyTree, PyTree]
    loss_fn: LossFn | None


@dataclass(frozen=True)
class Sizes:
    """Sizes of the batches of the project's own models, and of its transformer."""

    batch_size: int = 32
    image_size: int = 32
    width: int = 64
    blocks: int = 4
    heads: int = 4
    context: int = 64


def load(name: str, sizes: Sizes) -> Model:
    """A model by its name.

    Args:
      name: a name of `fdg_jax.models.create`, "transformer", or "module:function", which is
        imported and called.
      sizes: sizes for the project's own models.

    Returns:
      The model; the project's own models have random inputs and labels.

    Raises:
      UsageError: unknown name, or the function does not return a model.
    """
    if ":" in name:
        return _of_function(name)
    rng = np.random.default_rng(0)
    if name == "transformer":
        if sizes.width % sizes.heads:
            raise UsageError(
                f"--heads={sizes.heads}: does not divide --width={sizes.width}; choose one that "
                "does"
            )
        layers = transformer(VOCABULARY, sizes.width, sizes.blocks, sizes.heads)
        shape: tuple[int, ...] = (sizes.batch_size, sizes.context)
        tokens = rng.integers(VOCABULARY, size=(2, *shape), dtype=np.int32)
        return Model(layers, (tokens[0], tokens[1]), loss_fn)
    with blame("model"):
        try:
            layers = fdg.models.create(name, CLASSES, CHANNELS)
        except ValueError as error:
            raise ValueError(f"{error}; or transformer, or module:function") from error
    shape = (sizes.batch_size, sizes.image_size, sizes.image_size, CHANNELS)
    labels = rng.integers(CLASSES, size=sizes.batch_size, dtype=np.int32)
    return Model(layers, (rng.standard_normal(shape, np.float32), labels), loss_fn)


def _of_function(name: str) -> Model:
    function = _function(name)
    try:
        made = function()
    except Exception as error:
        raise UsageError(
            f"--model={name}: the function fails, called without arguments: "
            f"{type(error).__name__}: {error}; {RETURNS} from it"
        ) from error
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise UsageError(f"--model={name}: the function returns {_what(made)}; {RETURNS}")
    layers, batch, loss = made if len(made) == 3 else (*made, None)
    with blame(f"model={name}"):
        layers = check_layers(layers)
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise UsageError(f"--model={name}: its batch is {_what(batch)}; {RETURNS}")
    if loss is not None and not callable(loss):
        raise UsageError(f"--model={name}: its loss is {_what(loss)}, no function; {RETURNS}")
    for leaf in jax.tree.leaves(batch):
        if not hasattr(leaf, "shape"):
            raise UsageError(f"--model={name}: its batch holds {_what(leaf)}; give arrays")
    return Model(layers, batch, loss)


def _function(name: str) -> Callable[[], Any]:
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise UsageError(f"--model={name}: is no module:function; give one such as my_model:make")
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise UsageError(
            f"--model={name}: {module} cannot be imported ({type(error).__name__}: {error}); name "
            "a module that Python finds from this folder"
        ) from error
    if not callable(found):
        what = "has no" if found is None else f"has {_what(found)}, no function,"
        raise UsageError(f"--model={name}: {module} {what} {attribute}; name a function of it")
    function: Callable[[], Any] = found
    return function


def _what(value: Any) -> str:
    many = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{many}"
