"""Sizes of the data held by a stage, from shapes only."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.engine.reversible import kept_by
from fdg_jax.engine.template import part_of
from fdg_jax.typing import PyTree


class StageBytes(NamedTuple):
    """Bytes by stage; per mini-batch, summed over its micro-batches.

    Attributes:
      inputs: the stage's input.
      kept: the part of the input stored if the stage reconstructs its inputs.
      residuals: values stored by a forward for its backward, besides input and weights; 0 if the
        gradient rule does not store them.
      parameters: one version of the weights.
      optimizer: the optimizer's state.
    """

    inputs: tuple[int, ...]
    kept: tuple[int, ...]
    residuals: tuple[int, ...]
    parameters: tuple[int, ...]
    optimizer: tuple[int, ...]


def stage_bytes(pipe: Pipeline, example: tuple[PyTree, PyTree]) -> StageBytes:
    """Computes the sizes of the data held by the stages of a pipeline, from shapes.

    Args:
      pipe: the pipeline, without tied arrays.
      example: a batch ``(inputs, labels)``; only shapes and dtypes are used.

    Returns:
      Bytes by stage, as used by `Costs`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import fdg_jax as fdg
      >>> layers = [fdg.from_fn(jnp.tanh)] * 2
      >>> pipe = fdg.Pipeline(layers, lambda y, t: (jnp.mean((y - t) ** 2), {}),
      ...                     optax.sgd(0.1), fdg.schedule.fdg(2))
      >>> batch = jnp.ones((8, 3), jnp.float32), jnp.zeros((8, 3), jnp.float32)
      >>> found = stage_bytes(pipe, batch)
      >>> found.inputs, found.parameters, found.residuals[0]  # nothing to differentiate in stage 0
      ((96, 96), (0, 0), 0)
    """
    parts = pipe.schedule.microbatches
    x, labels = part_of(example, parts)
    key, number = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    record = pipe.record()
    rows = []
    for stage in pipe.stages:
        params, model_state, opt_state = stage.shapes(x)
        own_labels = labels if stage.labelled else None
        made = jax.eval_shape(
            stage.forward, params, model_state, x, own_labels, key, number, record
        )
        of_batch = x, kept_by(stage.layer, params, model_state, x), made.residuals
        sizes = [parts * nbytes(tree) for tree in of_batch]
        rows.append((*sizes, nbytes(params), nbytes(opt_state)))
        x = made.output
    return StageBytes(*zip(*rows, strict=True))


def nbytes(tree: PyTree) -> int:
    """Bytes of a tree's arrays or shapes, not counting keys."""
    plain = (leaf for leaf in jax.tree.leaves(tree) if is_plain(leaf))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in plain)


def is_plain(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers; keys do not expose their buffer."""
    return hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
