"""Checks that a state belongs to this pipeline and has not been consumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from fdg_jax.engine.state import PipelineState
from fdg_jax.errors import ConsumedStateError

# Parts of a state with donated buffers, and parts that a prediction reads.
TAKEN = ("params", "model_state", "opt_state", "gradient", "synthesizer")
READ = ("params", "model_state", "opt_state")


def check_state(state: Any, num_stages: int, parts: Sequence[str] = TAKEN) -> None:
    """Rejects invalid and consumed states before anything is dispatched.

    Args:
      state: the argument to check.
      num_stages: K.
      parts: names of the parts of a `StageState` that must not be deleted.

    Raises:
      ValueError: not a state, or another number of stages.
      ConsumedStateError: its buffers were donated to a step or drain.
    """
    if not isinstance(state, PipelineState):
        raise ValueError(
            f"state: is a {type(state).__name__}; give what Pipeline.init returned, and after "
            "state, metrics = pipe.step(state, batch) the new state"
        )
    if len(state.stages) != num_stages:
        raise ValueError(
            f"state: has {len(state.stages)} stages, this pipeline {num_stages}; give a state of "
            "this pipeline, or convert it with fdg_jax.checkpoint.convert"
        )
    for own in state.stages:
        for leaf in jax.tree.leaves([getattr(own, part) for part in parts]):
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise ConsumedStateError()
