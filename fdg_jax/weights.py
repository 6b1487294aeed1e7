"""The weights in a checkpoint, without the pipeline that made it."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from fdg_jax import manifest
from fdg_jax.checkpoint import ARRAYS
from fdg_jax.layer import Layer, PyTree, chain


class Weights(NamedTuple):
    """What a network needs to predict.

    Attributes:
      params, model_state: one pytree a stage, of numpy arrays.
    """

    params: list[PyTree]
    model_state: list[PyTree]


def read(folder: str | os.PathLike[str], stages: Sequence[Layer], example: PyTree) -> Weights:
    """The weights in a checkpoint, as they are: what is in flight is left out, not applied.

    Nothing is computed, and no optimizer state read.

    Args:
      folder: one checkpoint, such as ``checkpoints/step-000000500``.
      stages: the layers of the pipeline that saved it, cut as they were.
      example: an input with its batch axis; only shapes and dtypes are looked at.

    Returns:
      `Weights`.

    Raises:
      ValueError: the checkpoint is damaged, or of another network or other cuts.
      FileNotFoundError: there is none.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, optax
      >>> import fdg_jax as fdg
      >>> from fdg_jax.checkpoint import Checkpointer
      >>> layer = fdg.Layer(lambda key, x: (jnp.ones(()), ()),
      ...                   lambda p, s, x, *, train, key: (p * x, s))
      >>> pipe = fdg.Pipeline([layer], lambda y, t: (jnp.mean((y - t) ** 2), {}),
      ...                     lambda k: optax.sgd(0.1), fdg.schedule.fdg(1))
      >>> x = jnp.ones((4, 1))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     with Checkpointer(directory, pipe) as checkpoints:
      ...         checkpoints.save(pipe.init(jax.random.key(0), x), step=5)
      ...     [weight] = read(f"{directory}/step-000000005", [layer], x).params
      >>> float(weight)
      1.0
    """
    folder = pathlib.Path(folder).absolute()
    body = manifest.read(folder)
    if (body["format"], body["stages"]) != (manifest.FORMAT, len(stages)):
        raise ValueError(
            f"stages: {folder} has {body['stages']} (format {body['format']}), and these are "
            f"{len(stages)} (format {manifest.FORMAT}); give the stages that it was made with"
        )
    templates = jax.eval_shape(chain(stages).init, jax.random.key(0), example)
    empty: list[dict[str, list[np.ndarray]]] = [{} for _ in stages]
    for k, own in enumerate(empty):
        signatures = dict(body["sections"][k])
        for name, template in zip(Weights._fields, templates, strict=True):
            what = f"{folder}: stage {k}, {name}"
            manifest.fit(what, signatures[name], template[k], exact=True)
            leaves = jax.tree.leaves(template[k])
            own[name] = [np.empty(leaf.shape, leaf.dtype) for leaf in leaves]
    # Orbax gives back arrays of numpy for such as these, and had none without elements to save.
    wanted = {
        f"stage_{k}": {
            f"{name}/{i}": array
            for name, arrays in own.items()
            for i, array in enumerate(arrays)
            if array.size
        }
        for k, own in enumerate(empty)
    }
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        loaded = ocp.load_checkpointables(
            folder / ARRAYS, {stage: arrays for stage, arrays in wanted.items() if arrays}
        )
    found: list[list[PyTree]] = []
    for name, template in zip(Weights._fields, templates, strict=True):
        found.append([])
        for k, tree in enumerate(template):
            there = loaded.get(f"stage_{k}", {})
            arrays = [there.get(f"{name}/{i}", array) for i, array in enumerate(empty[k][name])]
            found[-1].append(jax.tree.unflatten(jax.tree.structure(tree), arrays))
    return Weights(*found)
