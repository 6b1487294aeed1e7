"""Whether a batch fits the network, the loss and the optimizer, found out by tracing alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState
from fdg_jax.engine.template import part_of
from fdg_jax.partition.layerwise import difference
from fdg_jax.typing import PyTree


def signature(tree: PyTree) -> Any:
    """Structure, shapes and dtypes of a tree; hashable."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(v), getattr(v, "dtype", type(v))) for v in leaves)


def pair(batch: Any) -> tuple[PyTree, PyTree]:
    """Inputs and labels of a batch.

    Raises:
      ValueError: it is no pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        many = f" of {len(batch)}" if isinstance(batch, tuple | list | dict) else ""
        raise ValueError(
            f"batch: is a {type(batch).__name__}{many}; give a pair (inputs, labels), each an "
            "array or a pytree of arrays"
        )
    return batch[0], batch[1]


def fit(
    stages: Sequence[Stage], microbatches: int, state: PipelineState, x: PyTree, labels: PyTree
) -> None:
    """Traces the network and the losses; nothing is computed.

    Found in the middle of a tick, a batch that does not fit would take the donated weights of other
    stages with it.

    Args:
      stages: the network's stages, input first.
      microbatches: parts of a mini-batch.
      state: of a pipeline of these stages.
      x, labels: a mini-batch; only shapes and dtypes are looked at.

    Raises:
      ValueError: it does not fit; the message names the stage.
    """
    y, targets = part_of((x, labels), microbatches)
    where = ""
    try:
        for k, (stage, own) in enumerate(zip(stages, state.stages, strict=True)):
            where = f"stage {k} ({stage.layers})"
            y, scores, new = stage.output(own.params, own.model_state, y, own.key, own.number)
            if found := difference(own.model_state, new):
                raise ValueError(
                    f"its model state changes in training: {found}; a layer must return a state "
                    "of the structure, shapes and dtypes that its init made"
                )
            if stage.loss_fn is not None:
                where = "loss_fn"
                _check_loss(jax.eval_shape(stage.loss_fn, scores, targets), microbatches)
    except _WrongLossError:
        raise
    except Exception as error:
        raise ValueError(f"batch {int(state.tick)}: does not fit {where}: {error}") from error


def check_optimizer(
    stage: Stage, k: int, params: PyTree, opt_state: PyTree, accumulates: bool
) -> None:
    """Traces an update; nothing is computed.

    Args:
      stage: whose optimizer is tried.
      k: its number.
      params, opt_state: shapes and dtypes.
      accumulates: whether an update may have more than one gradient.

    Raises:
      ValueError: the optimizer fails, or changes structure, shapes or dtypes of params or state.
    """

    def update(params: PyTree, opt_state: PyTree, staleness: jax.Array) -> tuple[PyTree, PyTree]:
        extra = {"stale_params": params, "staleness": staleness}
        if not accumulates:
            return stage.apply_one(params, opt_state, params, **extra)
        gradient, opt_state = stage.correct(params, opt_state, params, **extra)
        return stage.apply(params, opt_state, gradient)

    late = jax.ShapeDtypeStruct((), np.float32)
    try:
        after = jax.eval_shape(update, params, opt_state, late)
    except Exception as error:
        raise ValueError(
            f"optimizer: that of stage {k} ({stage.layers}) fails in its update: "
            f"{type(error).__name__}: {error}"
        ) from error
    for name, old, new in zip(("params", "state"), (params, opt_state), after, strict=True):
        if found := difference(old, new):
            raise ValueError(
                f"optimizer: that of stage {k} ({stage.layers}) changes the {name}: {found}; an "
                "update must keep structure, shapes and dtypes"
            )


class _WrongLossError(ValueError):
    """What the loss function returns is not what it must return."""


def _check_loss(found: Any, microbatches: int) -> None:
    if not (
        isinstance(found, tuple)
        and len(found) == 2
        and getattr(found[0], "shape", None) == ()
        and isinstance(found[1], dict)
    ):
        raise _WrongLossError(
            f"loss_fn: returns {found}, but must return the mean loss (a scalar) and a dict of "
            "metrics"
        )
    if microbatches > 1 and any(leaf.ndim for leaf in jax.tree.leaves(found[1])):
        raise _WrongLossError(
            f"loss_fn: returns metrics {found[1]}, but those of micro-batches are averaged: "
            "give scalars that are means over the batch"
        )
