"""The state of a pipeline: what every stage has, what is in flight, what is on its way."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax

from fdg_jax.engine.nonfinite import Record
from fdg_jax.engine.residuals import Stash
from fdg_jax.typing import Key, PyTree


class Flight(NamedTuple):
    """One micro-batch that a stage has forwarded and not yet back-propagated.

    Attributes:
      params: the weights of its forward, shared with others that met the same version; None where
        the backward is to use those of its own day.
      version: which version that is.
      stash: the rest of what the backward needs.
    """

    params: PyTree
    version: int
    stash: Stash


class StageState(NamedTuple):
    """All that one stage has, on its own devices.

    Micro-batches are numbered through: number m of mini-batch n is n * microbatches + m, and where
    mini-batches are not divided, that is n.

    Attributes:
      params, model_state, opt_state: today's.
      older: earlier versions of the weights that the schedule asks to keep, by version.
      gradient: sum of the gradients not yet applied, or None.
      held: how many that are.
      version: updates made so far.
      base: updates made before the last fill.
      key: the root key.
      number: micro-batches forwarded so far, int32.
      flights: what is in flight, by micro-batch.
      activations: inputs sent by the stage before and not yet consumed, by micro-batch.
      cotangents: error gradients sent by the next stage and not yet consumed, by micro-batch.
      labels: in the last stage, labels not yet consumed, by micro-batch.
      metrics: in the last stage, metrics of the micro-batches of an unfinished mini-batch, by
        mini-batch.
      record: of what was not finite (`fdg_jax.engine.nonfinite`), or None where nobody looks.
    """

    params: PyTree
    model_state: PyTree
    opt_state: optax.OptState
    key: Key
    number: jax.Array
    older: dict[int, PyTree]
    gradient: PyTree
    held: int
    version: int
    base: int
    flights: dict[int, Flight]
    activations: dict[int, PyTree]
    cotangents: dict[int, PyTree]
    labels: dict[int, PyTree]
    metrics: dict[int, list[dict[str, jax.Array]]]
    record: Record

    @staticmethod
    def fresh(
        params: PyTree,
        model_state: PyTree,
        opt_state: optax.OptState,
        key: Key,
        number: jax.Array,
        record: Record = None,
    ) -> StageState:
        """A stage that no batch has entered yet."""
        return StageState(
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            key=key,
            number=number,
            older={},
            gradient=None,
            held=0,
            version=0,
            base=0,
            flights={},
            activations={},
            cotangents={},
            labels={},
            metrics={},
            record=record,
        )

    def copied(self) -> StageState:
        """The same, with dictionaries of its own."""
        # A tree.map over a state may have made arrays of its numbers.
        return self._replace(
            held=int(self.held),
            version=int(self.version),
            base=int(self.base),
            older=dict(self.older),
            flights={n: f._replace(version=int(f.version)) for n, f in self.flights.items()},
            activations=dict(self.activations),
            cotangents=dict(self.cotangents),
            labels=dict(self.labels),
            metrics={n: list(parts) for n, parts in self.metrics.items()},
        )


class PipelineState(NamedTuple):
    """The state of a whole pipeline; a pytree. ``jax.tree.map(jnp.copy, state)`` copies it.

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
