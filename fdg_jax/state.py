"""The state of a pipeline: what every stage has, what is in flight, what is on its way."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax

from fdg_jax.layer import Key, PyTree
from fdg_jax.stage import Residuals


class Flight(NamedTuple):
    """One mini-batch that a stage has forwarded and not yet back-propagated.

    Attributes:
      params: the weights of its forward (shared with other batches that met the same version).
      version: which version that is.
      inputs: the stage's input.
      number: the batch's number, int32, on the stage's devices.
      residuals: the rest of what the backward needs.
    """

    params: PyTree
    version: int
    inputs: PyTree
    number: jax.Array
    residuals: Residuals


class StageState(NamedTuple):
    """All that one stage has, on its own devices.

    Attributes:
      params, model_state, opt_state: today's.
      gradient: sum of the gradients not yet applied, or None.
      held: how many that are.
      version: updates made so far.
      key: the root key.
      number: forwards made so far, int32.
      flights: batches in flight, by number.
      activations: inputs sent by the stage before and not yet consumed, by batch.
      cotangents: error gradients sent by the next stage and not yet consumed, by batch.
      labels: in the last stage, labels not yet consumed, by batch.
    """

    params: PyTree
    model_state: PyTree
    opt_state: optax.OptState
    gradient: PyTree
    held: int
    version: int
    key: Key
    number: jax.Array
    flights: dict[int, Flight]
    activations: dict[int, PyTree]
    cotangents: dict[int, PyTree]
    labels: dict[int, PyTree]


class PipelineState(NamedTuple):
    """The state of a whole pipeline; a pytree.

    Attributes:
      tick: mini-batches that have entered so far, which is the number of the next one.
      origin: the number of the first that entered after the last drain.
      key: the root key.
      stages: one `StageState` per stage.
    """

    tick: int
    origin: int
    key: Key
    stages: tuple[StageState, ...]
