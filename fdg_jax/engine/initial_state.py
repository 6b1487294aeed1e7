"""Creates a state with fresh parameters and empty slots."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.engine.placement import put
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState, StageState
from fdg_jax.engine.synthesizer import Output
from fdg_jax.engine.template import part_of
from fdg_jax.layer import output_of, typed_key
from fdg_jax.tied_stage import lent, paired
from fdg_jax.typing import Key, PyTree


def initial_state(
    stages: Sequence[Stage],
    shapes: PipelineState,
    key: Key,
    x: PyTree,
    labels: PyTree,
    record: np.ndarray | None,
) -> PipelineState:
    """A state before the first mini-batch, each stage on its own devices.

    Args:
      stages: the pipeline's stages.
      shapes: the template of its states.
      key: the root key, typed or raw.
      x, labels: a batch, the inputs with their batch axis; only shapes and dtypes are used.
      record: a record without failures, or None if non-finite values are not checked.

    Returns:
      The state.
    """
    with jax.transfer_guard("allow"):
        # Via the host: a key on a mesh of the program would carry that mesh along.
        typed = typed_key(key)
        data = np.asarray(jax.random.key_data(typed))
        key = jax.random.wrap_key_data(jnp.array(data), impl=jax.random.key_impl(typed))
    states = []
    x, labels = part_of((x, labels), 1)
    tied = None
    for stage, own in zip(stages, shapes.stages, strict=True):
        x, tied = paired(stage.layer, x, tied), lent(stage.layer, own.params) or tied
        params, model_state, opt_state = stage.init(key, x)
        y = output_of(stage.layer, params, model_state, x)
        own_key, number = put((key, np.zeros((), np.int32)), stage.replicated)
        states.append(
            blank(stage, own)._replace(
                params=params,
                model_state=model_state,
                opt_state=opt_state,
                key=own_key,
                number=number,
                record=put(record, stage.replicated),
                synthesizer=stage.init_synthesizer(
                    key, own.synthesizer, Output(y, labels, own.number)
                ),
            )
        )
        x = y
    return PipelineState(shapes.tick, shapes.origin, key, tuple(states))


def blank(stage: Stage, own: StageState) -> StageState:
    """A stage's template with empty slots and no gradients, otherwise unchanged."""
    return own._replace(
        gradient=stage.zeros(own.gradient),
        flights=stage.zeros_of(own.flights),
        versions=stage.zeros_of(own.versions),
        inbox={port: stage.zeros_of(slots) for port, slots in own.inbox.items()},
    )
