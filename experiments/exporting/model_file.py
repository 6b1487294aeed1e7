"""Exported models: one safetensors file or Orbax directory, independent of the run.

    layer_003/conv/kernel              parameters, by layer of the uncut network
    model_state/layer_003/norm/mean    model state, such as batch statistics

In an Orbax folder the same is a tree, ``{"params": {"layer_003": ...}, "model_state": ...}``, under
``arrays``. The metadata (manifest.json in a folder) name the network and describe its inputs and
outputs: classes and normalisation of images, or the bytes of a language model.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialised

import fdg_jax as fdg
from experiments.tasks import task_of
from experiments.training.loop import params_sha256
from fdg_jax.checkpoint import manifest
from fdg_jax.checkpoint.restore import ARRAYS
from fdg_jax.layer import Layer
from fdg_jax.partition.layerwise import difference, join, separate
from fdg_jax.typing import PyTree

FORMATS = ("safetensors", "orbax")
SECTIONS = ("params", "model_state")
# Errors raised when reading damaged files.
DAMAGE = (
    OSError,
    SafetensorError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RecursionError,
)
_KEY = "fdg_jax"  # key of the metadata, a string, in a safetensors file


def layers(about: dict[str, Any]) -> list[Layer]:
    """The layers of the network named by the metadata.

    Args:
      about: metadata from `load`, or the content of a run's config.json.

    Returns:
      Its layers, input first.

    Raises:
      ValueError: the metadata name no network.
    """
    try:
        return task_of(about).network(about)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"metadata: name no network ({_line(error)})") from error


def example(about: dict[str, Any], batch_size: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an input of the network named by the metadata."""
    return task_of(about).example(about, batch_size)


def named(params: Sequence[PyTree], model_state: Sequence[PyTree]) -> dict[str, Any]:
    """All arrays by name.

    Args:
      params, model_state: one pytree per layer.

    Returns:
      Arrays by section, number of the layer and path, in the order of a flattened
      ``(params, model_state)``.

    Example:
      >>> named([(), {"dense": {"kernel": 1.0}}], [(), ()])
      {'params/layer_001/dense/kernel': 1.0}
    """
    found = {}
    for section, trees in zip(SECTIONS, (params, model_state), strict=True):
        for i, tree in enumerate(trees):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                inner = [jax.tree_util.keystr((key,), simple=True) for key in path]
                found["/".join([section, f"layer_{i:03d}", *inner])] = leaf
    return found


def save(
    path: pathlib.Path, kind: str, arrays: dict[str, np.ndarray], about: dict[str, Any]
) -> None:
    """Writes a model atomically, replacing an existing one.

    Args:
      path: a path in an existing folder.
      kind: one of `FORMATS`.
      arrays: the result of `named`.
      about: the metadata, as JSON data; the hash of the arrays is added.

    Raises:
      OSError, RuntimeError, ValueError: the model cannot be written.
    """
    about = {**about, "sha256": params_sha256([arrays])}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        new = pathlib.Path(scratch).absolute() / "new"
        if kind == "orbax":
            ocp.save(new / ARRAYS, _nested(arrays))
            manifest.write(new, about)
        else:
            # safetensors copies memory as it is, so arrays must be in C order.
            ordered = {
                name.removeprefix("params/"): np.array(array, order="C")
                for name, array in arrays.items()
            }
            new.write_bytes(serialised(ordered, {_KEY: json.dumps(about)}))
        if path.is_dir() or (path.exists() and new.is_dir()):
            path.rename(new.with_name("old"))
        new.rename(path)


def load(path: str | os.PathLike[str]) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """Loads a model written by `experiments.export`, for ``fdg.chain(layers(about))``.

    Args:
      path: the safetensors file or the Orbax folder.

    Returns:
      params, model state (numpy arrays in that network's layout), and the metadata ``about``.

    Raises:
      ValueError: there is no such model, or it is damaged.

    Example:
      >>> params, model_state, about = load("model.safetensors")      # doctest: +SKIP
      >>> network = fdg.chain(layers(about))                          # doctest: +SKIP
      >>> x = data.normalise(images, about["mean"], about["std"])     # doctest: +SKIP
      >>> logits, _ = network.apply(params, model_state, x,           # doctest: +SKIP
      ...                           train=False, key=None)
      >>> [about["class_names"][i] for i in logits.argmax(-1)]        # doctest: +SKIP
      ['cat', 'ship']

      Inputs and labels of a language model are indices into ``about["vocabulary"]``, a list of
      bytes.
    """
    path = pathlib.Path(path).expanduser().absolute()
    about = metadata(path)
    try:
        network = fdg.chain(layers(about))
        templates = jax.eval_shape(network.init, jax.random.key(0), example(about, 1))
        parts = [jax.eval_shape(lambda tree: separate(network, tree), tree) for tree in templates]
        expected = named(*parts)
        arrays = _read(path, expected)
        if found := difference(arrays, expected):
            raise ValueError(f"{found}, the network that it names")
        if params_sha256([arrays]) != about.get("sha256"):
            raise ValueError("its arrays have changed")
    except DAMAGE as error:
        raise ValueError(f"{path}: is no model that can be used ({_line(error)})") from error
    filled = jax.tree.unflatten(jax.tree.structure(parts), [arrays[name] for name in expected])
    params, model_state = (join(network, trees) for trees in filled)
    return params, model_state, about


def metadata(path: pathlib.Path) -> dict[str, Any]:
    """The metadata of a model; arrays are not read.

    Raises:
      ValueError: not a model of fdg_jax.
    """
    try:
        if path.is_dir():
            about = manifest.read(path)
            manifest.verify(path, about)
            del about["files"]
        else:
            with safe_open(path, framework="numpy") as file:
                about = json.loads((file.metadata() or {}).get(_KEY, "null"))
    except DAMAGE as error:
        raise ValueError(f"{path}: is no model that can be read ({_line(error)})") from error
    if not isinstance(about, dict) or "params_sha256" not in about:
        raise ValueError(f"{path}: is no model that experiments.export wrote")
    return about


def _read(path: pathlib.Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays, with the names of `named`."""
    if path.is_dir():
        # Orbax restores numpy arrays for these.
        empty = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in expected.items()}
        return {
            jax.tree_util.keystr(names, simple=True, separator="/"): array
            for names, array in jax.tree_util.tree_leaves_with_path(
                ocp.load(path / ARRAYS, _nested(empty))
            )
        }
    with safe_open(path, framework="numpy") as file:
        return {
            name if name.startswith("model_state/") else f"params/{name}": file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
        }


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {section: {} for section in SECTIONS}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return tree


def _line(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())
