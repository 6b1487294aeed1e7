"""Checks an optimizer's update by tracing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fdg_jax.engine.residuals import split_inexact
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState, StageState
from fdg_jax.engine.synthesizer import Output
from fdg_jax.partition.layerwise import change
from fdg_jax.schedule import Schedule
from fdg_jax.typing import PyTree

# Python's message about missing arguments of a call.
_MISSING = re.compile(r"missing \d+ required (?:keyword-only|positional) arguments?: (.*)")


def check_optimizers(stages: Sequence[Stage], schedule: Schedule, state: PipelineState) -> None:
    """Traces an update of every stage; computes nothing.

    Args:
      stages: the stages whose optimizers are checked.
      schedule: determines whether an update may have more than one gradient.
      state: a state of these stages; only shapes and dtypes are used.

    Raises:
      ValueError: an optimizer requires unavailable arguments, fails, or changes structure, shapes
        or dtypes of params or state; the message names the stage and the array.
    """
    for k, (stage, own) in enumerate(zip(stages, state.stages, strict=True)):
        _check_optimizer(stage, k, own, schedule.gradients(k) > 1)


def _check_optimizer(stage: Stage, k: int, own: StageState, accumulates: bool) -> None:
    given = {"stale_params": own.params, "staleness": jax.ShapeDtypeStruct((), np.float32)}
    names = ("params", "state")

    def update(
        params: PyTree, opt_state: PyTree, extra: dict[str, PyTree]
    ) -> tuple[PyTree, PyTree]:
        if not accumulates:
            return stage.apply_one(params, opt_state, params, **extra)
        gradient, opt_state = stage.correct(params, opt_state, params, **extra)
        return stage.apply(params, opt_state, gradient)

    who = f"optimizer: that of stage {k} ({stage.layers})"
    try:
        after = jax.eval_shape(update, own.params, own.opt_state, given)
    except Exception as error:
        if missing := _missing(error):
            has = " and ".join(given)
            if accumulates:
                has = f"{has}, and only per_gradient of a StageOptimizer gets them here, where an "
                has += "update has more than one gradient"
            raise ValueError(
                f"{who} asks for {missing}, which a stage does not have: beside gradient, state "
                f"and params there are {has}; take an optimizer that needs no more "
                f"({type(error).__name__}: {error})"
            ) from error
        if not _made_by(stage, own):
            raise ValueError(
                f"state: that of stage {k} ({stage.layers}) was made with another network or "
                "optimizer; give a state of this pipeline"
            ) from error
        raise ValueError(f"{who} fails in its update: {type(error).__name__}: {error}") from error
    for name, old, new in zip(names, (own.params, own.opt_state), after, strict=True):
        if found := change(old, new):
            raise ValueError(
                f"{who} changes the {name}: {found}; an update must keep structure, shapes and "
                "dtypes"
            )


def _made_by(stage: Stage, own: StageState) -> bool:
    """Whether the optimizer's state fits the params and the optimizer of a stage."""
    try:
        fresh = jax.eval_shape(stage.optimizer.init, own.params)
    except Exception:  # params of another network
        return False
    return change(fresh, own.opt_state) is None


def _missing(error: Exception) -> str | None:
    """The names of missing arguments in an error of a call."""
    if isinstance(error, TypeError) and (found := _MISSING.search(str(error))):
        return found[1].replace("'", "")
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        return error.args[0]
    return None


def check_model_state(old: PyTree, new: PyTree) -> None:
    """Rejects layers that change structure, shapes or dtypes of their model state in training.

    Args:
      old: the model state from init.
      new: the model state returned in training.

    Raises:
      ValueError: structure, shapes or dtypes differ; the message names the array.
    """
    if found := change(old, new):
        raise ValueError(
            f"its model state changes in training: {found}; a layer must return a state of the "
            "structure, shapes and dtypes that its init made"
        )


def check_synthesizer(stage: Stage, k: int, own: StageState, y: PyTree, labels: PyTree) -> None:
    """Traces the training of a synthesizer; computes nothing.

    Args:
      stage: the stage whose synthesizer is checked, if it has one.
      k: its number.
      own: its state.
      y: its output.
      labels: the batch's labels.

    Raises:
      ValueError: the synthesizer or its optimizer fails, or changes structure, shapes or dtypes.
    """
    if stage.synthesizer is None:
        return
    number: Any = jax.ShapeDtypeStruct((), np.int32)
    cotangent = jax.eval_shape(lambda leaf: split_inexact(leaf)[0], y)
    who = f"synthesizers: that of stage {k} ({stage.layers})"
    try:
        new = jax.eval_shape(
            stage.synthesizer.teach, own.synthesizer, Output(y, labels, number), cotangent, own.key
        )
    except Exception as error:
        asks = f"asks for {missing}, which it does not have" if (missing := _missing(error)) else ""
        raise ValueError(
            f"{who} {asks or 'fails in its update'}: {type(error).__name__}: {error}"
        ) from error
    if found := change(own.synthesizer, new):
        raise ValueError(f"{who} changes in an update: {found}; it must keep shapes and dtypes")
