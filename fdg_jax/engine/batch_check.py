"""Checks by tracing that a batch fits the network, the loss and the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fdg_jax.engine.batch_axes import check_axes
from fdg_jax.engine.loss import LossError, Weighted, check_weighted
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState
from fdg_jax.engine.template import part_of
from fdg_jax.engine.update_check import check_model_state, check_optimizers, check_synthesizer
from fdg_jax.schedule import Schedule
from fdg_jax.shared import plain
from fdg_jax.tied_stage import lent, paired
from fdg_jax.typing import PyTree


def signature(tree: PyTree) -> Any:
    """Structure, shapes and dtypes of a tree; hashable."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(v), getattr(v, "dtype", type(v))) for v in leaves)


def pair(batch: Any, name: str = "batch") -> tuple[PyTree, PyTree]:
    """Inputs and labels of a batch, an argument of the given name.

    Raises:
      ValueError: it is not a pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        many = f" of {len(batch)}" if isinstance(batch, tuple | list | dict) else ""
        raise ValueError(
            f"{name}: is a {type(batch).__name__}{many}; give a pair (inputs, labels), each an "
            "array or a pytree of arrays"
        )
    return batch[0], batch[1]


def check_structure(x: PyTree, expected: Any, name: str) -> None:
    """Raises `ValueError` for inputs whose structure differs from the example's.

    A module may accept a pair as one array, so labels passed with the inputs would go unnoticed.

    Args:
      x: inputs.
      expected: the structure of the example inputs; None before the first state.
      name: the name of the argument.
    """
    given = jax.tree.structure(plain(x))
    if expected is not None and given != expected:
        raise ValueError(
            f"{name}: the structure is {_short(given)}, that of init's example inputs "
            f"{_short(expected)}; give both the same, without labels"
        )


def _short(structure: Any) -> str:
    return str(structure).removeprefix("PyTreeDef(").removesuffix(")")


def fit(
    stages: Sequence[Stage],
    schedule: Schedule,
    state: PipelineState,
    x: PyTree,
    labels: PyTree,
    known: set[Any],
) -> None:
    """Traces the network, losses and updates; computes nothing.

    An error in the middle of a tick would lose the weights that other stages have donated.

    Args:
      stages: the network's stages, input first.
      schedule: the schedule, which divides mini-batches.
      state: a state of these stages.
      x, labels: a mini-batch; only shapes and dtypes are used.
      known: signatures of batches that fit; they are not checked again, and this one is added.

    Raises:
      ValueError: the batch cannot be divided or does not fit; an optimizer fails, or changes
        structure, shapes or dtypes; the message names the stage.
    """
    shapes = signature(x), signature(labels)
    if shapes in known:
        return
    microbatches, weighted = schedule.microbatches, False
    check_axes({"inputs": x, "labels": labels}, microbatches, stages[0].mesh.size)
    check_optimizers(stages, schedule, state)
    y, targets = part_of((x, labels), microbatches)
    where, tied = "", None
    try:
        for k, (stage, own) in enumerate(zip(stages, state.stages, strict=True)):
            where = f"stage {k} ({stage.layers}): "
            y, tied = paired(stage.layer, y, tied), lent(stage.layer, own.params) or tied
            y, scores, new = stage.output(own.params, own.model_state, y, own.key, own.number)
            check_model_state(own.model_state, new)
            check_synthesizer(stage, k, own, y, targets)
            if stage.loss_fn is not None:
                where = ""  # the error message names it
                found = jax.eval_shape(stage.loss_fn, scores, targets)
                weighted = _check_loss(found, microbatches) or weighted
    except Exception as error:
        if isinstance(error, LossError) and error.__cause__ is None:
            raise  # its value is invalid for any batch
        raise ValueError(f"batch {int(state.tick)}: does not fit {where}{error}") from error
    if weighted:
        check_weighted(stages, schedule)
    known.add(shapes)


def _check_loss(found: Any, microbatches: int) -> bool:
    """Checks the metrics of micro-batches; returns whether the loss has a weight."""
    weighted = isinstance(found[1], Weighted)
    metrics = found[1].metrics if weighted else found[1]
    if microbatches > 1 and any(leaf.ndim for leaf in jax.tree.leaves(metrics)):
        raise LossError(
            f"loss_fn: returns metrics {metrics}, but those of micro-batches are averaged: "
            "give scalars that are means over the batch"
        )
    return weighted
