"""Reads the weights of a checkpoint without the pipeline that made it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from fdg_jax.checkpoint import array_store, manifest, snapshot
from fdg_jax.checkpoint.array_store import leaf
from fdg_jax.checkpoint.paths import local
from fdg_jax.checkpoint.restore import ARRAYS
from fdg_jax.engine.arguments import Optimizers, optimizers_of
from fdg_jax.layer import Layer, chain
from fdg_jax.shared import plain
from fdg_jax.tie import Tie
from fdg_jax.tied_stage import emptied, tied_stages, untied
from fdg_jax.typing import PyTree


class Weights(NamedTuple):
    """The arrays a network needs for prediction.

    Attributes:
      params, model_state: one pytree of numpy arrays per stage.
    """

    params: list[PyTree]
    model_state: list[PyTree]


def read(
    folder: str | os.PathLike[str],
    stages: Sequence[Layer],
    example: PyTree,
    optimizer: Optimizers | None = None,
    tie: Tie | None = None,
    averaged: bool = False,
) -> Weights:
    """Reads the weights of a checkpoint; gradients in flight are not applied.

    Args:
      folder: one checkpoint, such as ``checkpoints/step-000000500``.
      stages: the stages of the pipeline that saved it, with the same cuts.
      example: an input with its batch axis; only shapes and dtypes are used.
      optimizer: the pipeline's optimizer, in any form, if it predicts weights
        (`fdg_jax.predict_weights`, `fdg_jax.delayed_sgd`): its state is read as well, and the
        params are the true weights. If the rule extends the optimizer ("reconstruct"), those of
        the stages: ``lambda k: pipe.stages[k].optimizer``. None: no optimizer state is read.
      tie: the pipeline's tie; its array is then in both layers.
      averaged: whether to read the average of the weights (`fdg_jax.average_weights`) instead;
        requires ``optimizer``.

    Returns:
      `Weights`.

    Raises:
      ValueError: the checkpoint is damaged, or its network or cuts differ.
      FileNotFoundError: there is no checkpoint.

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
    if averaged and optimizer is None:
        raise ValueError("optimizer: must be given with averaged=True; its state has the average")
    folder = local(folder, "folder")
    if not folder.exists():
        raise FileNotFoundError(f"folder={folder}: there is no checkpoint; name one that is there")
    body = manifest.read(folder)
    made = (body.get("format"), body.get("stages"))
    if made != (manifest.FORMAT, len(stages)):
        raise ValueError(
            f"stages: {folder} has {manifest.short(made[1])} (format {manifest.short(made[0])}), "
            f"these are {len(stages)} (format {manifest.FORMAT}); give those that it was made with"
        )
    manifest.check(body, body.get("step", -1), len(stages))
    params, model_state = jax.eval_shape(chain(stages).init, jax.random.key(0), plain(example))
    stages = tied_stages(stages, tie)
    templates: tuple[Any, ...] = (emptied(stages, params), model_state)
    names: tuple[str, ...] = Weights._fields
    if optimizer is not None:
        names = (*names, "opt_state")
        optimizers = optimizers_of(optimizer, stages)
        pairs = zip(optimizers, templates[0], strict=True)
        states = [jax.eval_shape(own.init, params) for own, params in pairs]
        templates = (*templates, states)
    expected: list[dict[str, jax.ShapeDtypeStruct]] = [{} for _ in stages]
    for k, own in enumerate(expected):
        signatures = dict(body["sections"][k])
        for name, template in zip(names, templates, strict=True):
            what = f"{folder}: stage {k}, {name}"
            like = jax.tree.map(snapshot.stored, template[k])
            manifest.fit(what, signatures.get(name, []), like, exact=True)
            own |= {leaf(name, i): one for i, one in enumerate(jax.tree.leaves(like))}
    manifest.verify(folder, body)
    found = [array_store.read(folder / ARRAYS, k, own) for k, own in enumerate(expected)]
    parts: list[list[PyTree]] = []
    for name, template in zip(names, templates, strict=True):
        parts.append([])
        for k, tree in enumerate(template):
            likes, structure = jax.tree.flatten(tree)
            arrays = [snapshot.unraw(found[k][leaf(name, i)], like) for i, like in enumerate(likes)]
            parts[-1].append(jax.tree.unflatten(structure, jax.device_get(arrays)))
    if optimizer is not None:
        trees = zip(optimizers, parts[0], parts.pop(), strict=True)
        # Compiled, so that they are bitwise equal to `Pipeline.true_params`.
        parts[0] = [
            jax.device_get(jax.jit(one.averaged_params if averaged else one.true_params)(*pair))
            for one, *pair in trees
        ]
    return Weights(untied(stages, parts[0]), parts[1])
