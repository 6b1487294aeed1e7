"""Whether a batch fits the network and the loss, found out by tracing alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState
from fdg_jax.typing import LossFn, PyTree


def signature(tree: PyTree) -> Any:
    """Structure, shapes and dtypes of a tree; hashable."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(v), getattr(v, "dtype", type(v))) for v in leaves)


def fit(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    microbatches: int,
    state: PipelineState,
    x: PyTree,
    labels: PyTree,
) -> None:
    """Traces the network and the loss; nothing is computed.

    Found in the middle of a tick, a batch that does not fit would take the donated weights of other
    stages with it.

    Args:
      stages: the network's stages, input first.
      loss_fn: as in `fdg_jax.Pipeline`.
      microbatches: parts of a mini-batch.
      state: of a pipeline of these stages.
      x, labels: a mini-batch; only shapes and dtypes are looked at.

    Raises:
      ValueError: it does not fit; the message names the stage.
    """
    y, targets = _part(x, microbatches), _part(labels, microbatches)
    where = ""
    try:
        for k, (stage, own) in enumerate(zip(stages, state.stages, strict=True)):
            where = f"stage {k} ({stage.layers})"
            y = stage.output(own.params, own.model_state, y, own.key, own.number)
        where = "loss_fn"
        found = jax.eval_shape(loss_fn, y, targets)
    except Exception as error:
        raise ValueError(f"batch {int(state.tick)}: does not fit {where}: {error}") from error
    if not (
        isinstance(found, tuple)
        and len(found) == 2
        and getattr(found[0], "shape", None) == ()
        and isinstance(found[1], dict)
    ):
        raise ValueError(
            f"loss_fn: returns {found}, but must return the mean loss (a scalar) and a dict of "
            "metrics"
        )
    if "batch" in found[1]:
        raise ValueError('loss_fn: a metric is named "batch", which is the batch\'s number')
    if microbatches > 1 and any(leaf.ndim for leaf in jax.tree.leaves(found[1])):
        raise ValueError(
            f"loss_fn: returns metrics {found[1]}, but those of micro-batches are averaged: "
            "give scalars that are means over the batch"
        )


def _part(tree: PyTree, count: int) -> PyTree:
    """Shapes and dtypes of one of ``count`` micro-batches."""

    def part(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (leaf.shape[0] // count, *leaf.shape[1:]) if leaf.shape else ()
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(part, jax.eval_shape(lambda v: v, tree))
