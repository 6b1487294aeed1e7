"""Evaluation of a network, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

from fdg_jax.engine.messages import send
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import StageState
from fdg_jax.tied_stage import lends, lent, paired
from fdg_jax.typing import PyTree


def evaluate(
    stages: Sequence[Stage],
    states: Sequence[StageState],
    x: PyTree,
    params: Sequence[PyTree] | None = None,
) -> PyTree:
    """The network's outputs.

    Args:
      stages: input first.
      states: their states.
      x: inputs, batch axis first.
      params: weights, one pytree per stage, on its devices; None: the true weights.

    Returns:
      The last stage's output, as asynchronous arrays on its devices.
    """
    tied = None
    for k, (stage, own) in enumerate(zip(stages, states, strict=True)):
        x = paired(stage.layer, send(x, stage), send(tied, stage))
        if params is not None:
            x = stage.evaluate_at(params[k], own.model_state, x)
            tied = lent(stage.layer, params[k]) or tied
            continue
        x = stage.evaluate(own.params, own.opt_state, own.model_state, x)
        if lends(stage.layer):
            tied = lent(stage.layer, stage.true_params(own.params, own.opt_state)[0])
    return x
