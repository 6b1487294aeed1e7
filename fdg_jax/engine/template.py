"""The shapes, dtypes and placement of a state, determined by tracing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from fdg_jax.engine import nonfinite, remote_stage
from fdg_jax.engine.residuals import Stash, split_inexact
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState, Slots, StageState, scalar
from fdg_jax.engine.synthesizer import Output
from fdg_jax.engine.update_check import check_model_state
from fdg_jax.layer import output_of
from fdg_jax.schedule import Schedule
from fdg_jax.schedule.action import (
    ACTIVATION,
    COTANGENT,
    OUTPUT,
    OUTPUT_COTANGENT,
    TIED,
    TIED_GRADIENT,
)
from fdg_jax.schedule.ledger import LABEL, METRIC
from fdg_jax.shared import is_shared, plain
from fdg_jax.tie import Paired, value_of
from fdg_jax.tied_stage import lends, lent, paired
from fdg_jax.typing import PyTree


def template(
    stages: Sequence[Stage],
    schedule: Schedule,
    guarded: bool,
    example: tuple[PyTree, PyTree],
) -> PipelineState:
    """A state of `jax.ShapeDtypeStruct`, each with its sharding; host counters are numpy zeros.

    Args:
      stages: the pipeline's stages.
      schedule: its schedule, which determines the numbers of slots.
      guarded: whether stages keep a record of non-finite values.
      example: inputs and labels of a mini-batch; only shapes and dtypes are used. If labels are
        None, so are their slots.

    Returns:
      The template.

    Raises:
      ValueError: a parameter has no gradient; if stages are guarded, training changes shapes or
        dtypes of a model state.
    """
    x, labels = part_of(example, schedule.microbatches)
    key = jax.eval_shape(lambda: jax.random.key(0))
    found: list[tuple[PyTree, PyTree, PyTree, PyTree]] = []
    tied = None
    for stage in stages:
        x = paired(stage.layer, _placed(x, stage.placement), _whole(tied, stage))
        params, model_state, opt_state = stage.shapes(x)
        _check_parameters(stage, params)
        params, model_state = _whole((params, model_state), stage)
        opt_state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            opt_state,
            stage.shared(opt_state),
        )
        if guarded:  # otherwise checked with the first batch
            _check_state(stage, len(found), params, model_state, x)
        y = output_of(stage.layer, params, model_state, x)
        found.append((x, params, model_state, opt_state))
        tied = lent(stage.layer, params) or tied
        x = y
    made = []
    for k, (stage, (x, params, model_state, opt_state)) in enumerate(
        zip(stages, found, strict=True)
    ):
        counts = schedule.counts[k]
        own_key, number, record = _whole(
            (key, jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(nonfinite.fresh)), stage
        )
        record = record if guarded else None
        targets = None if not stage.labelled else _placed(labels, stage.placement)
        came = stage.sent(x) if k else x
        values: dict[str, PyTree] = {ACTIVATION: value_of(came), LABEL: targets}
        values[TIED] = came.tied if isinstance(came, Paired) else None
        values[TIED_GRADIENT] = lent(stage.layer, params)
        residuals, kept = None, came
        unknown = stage.labelled and labels is None
        synthesizer = None
        if stage.synthesizer is not None:
            y = found[k + 1][0]
            own = Output(y, labels, number)
            synthesizer = _whole(jax.eval_shape(stage.synthesizer.init, key, own), stage)
            values[OUTPUT] = Output(stage.sent(y), targets, number)
        if not unknown:
            args = (params, model_state, came, targets, own_key, number, record)
            forward = remote_stage.shapes(stage.forward, *args)
            kept = came if forward.kept is None else _placed(forward.kept, stage.placement)
            if stage.rule.keeps_residuals:
                batch = {leaf.shape[0] for leaf in jax.tree.leaves(value_of(x)) if leaf.ndim}
                residuals = _residuals(forward.residuals, batch, stage)
            values[METRIC] = _whole(forward.report, stage)
            values[COTANGENT] = _whole(forward.one, stage)
        if stage.loss_fn is None:
            above = value_of(found[k + 1][0])
            moving = jax.eval_shape(lambda v: split_inexact(v)[0], above)
            message = jax.eval_shape(stages[k + 1].rule.message, above, moving)
            values[COTANGENT] = stage.sent(message)
        values[OUTPUT_COTANGENT] = values.get(COTANGENT)
        if lends(stage.layer):
            values[OUTPUT_COTANGENT] = Paired(values[COTANGENT], values[TIED_GRADIENT])
        stash = Stash(kept, targets, model_state, number, residuals)
        versions = counts.slots["version" if stage.rule.keeps_weights else "kept"]
        ports = sorted(values.keys() & {port for port, n in counts.slots.items() if n})
        made.append(
            StageState(
                params=params,
                model_state=model_state,
                opt_state=opt_state,
                key=own_key,
                number=number,
                gradient=params if counts.pending else None,
                pending=scalar(0),
                version=scalar(0),
                base=scalar(0),
                flights=_slots(stash, counts.slots["flight"]),
                met=np.zeros(counts.slots["flight"], np.int32),
                versions=_slots(params, versions),
                inbox={port: _slots(values.get(port), counts.slots[port]) for port in ports},
                record=record,
                synthesizer=synthesizer,
            )
        )
    return PipelineState(scalar(0), scalar(0), key, tuple(made))


def _check_parameters(stage: Stage, params: PyTree) -> None:
    """Rejects parameters without a gradient.

    Raises:
      ValueError: one has an integer or boolean dtype; the message names it.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"params: {jax.tree_util.keystr(path)} of {stage.layers} is {leaf.dtype}, "
                "which has no gradient; keep it in the layer's state, the second value of its init"
            )


def _check_state(stage: Stage, k: int, params: PyTree, model_state: PyTree, x: PyTree) -> None:
    """Checks that training keeps structure, shapes and dtypes of the model state."""
    key, number = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    *_, new = stage.output(params, model_state, x, key, number)
    try:
        check_model_state(model_state, new)
    except ValueError as error:
        raise ValueError(f"stage {k} ({stage.layers}): {error}") from error


def part_of(tree: PyTree, count: int) -> PyTree:
    """Shapes and dtypes of one of ``count`` micro-batches, without marks."""

    def part(leaf: Any) -> PyTree:
        if is_shared(leaf):
            return plain(leaf)
        shape = (leaf.shape[0] // count, *leaf.shape[1:]) if leaf.shape else ()
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(part, jax.eval_shape(lambda v: v, tree), is_leaf=is_shared)


def _slots(value: PyTree, size: int) -> Slots:
    return Slots(np.full(size, -1, np.int32), (value,) * size)


def _placed(tree: PyTree, place: Callable[[Any], NamedSharding]) -> PyTree:
    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf))

    return jax.tree.map(one, tree)


def _whole(tree: PyTree, stage: Stage) -> PyTree:
    return _placed(tree, lambda leaf: stage.replicated)


def _residuals(tree: PyTree, batch: set[int], stage: Stage) -> PyTree:
    """Residuals with XLA's placement; those with a batch axis are usually sharded over it."""

    def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        over = leaf.ndim and leaf.shape[0] in batch and leaf.shape[0] % stage.mesh.size == 0
        return stage.sharded if over else stage.replicated

    return _placed(tree, place)
