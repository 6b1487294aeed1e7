"""Limits how far the host runs ahead of the devices."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import jax
import numpy as np

from fdg_jax.engine import nonfinite
from fdg_jax.engine.messages import Done, failure
from fdg_jax.engine.stage import Stage
from fdg_jax.errors import NonFiniteError


class RunAhead:
    """The programs of the latest ticks, with their tokens.

    Args:
      stages: the pipeline's stages.
      microbatches: number of micro-batches per mini-batch.
      stop: whether non-finite values end the run.
    """

    def __init__(self, stages: Sequence[Stage], microbatches: int, stop: bool) -> None:
        self._stages = stages
        self._microbatches = microbatches
        self._stop = stop
        self._ticks: collections.deque[list[Done]] = collections.deque()

    @property
    def idle(self) -> bool:
        """Whether all dispatched programs are known to have finished."""
        return not self._ticks

    def add(self, programs: list[Done]) -> None:
        """Adds the programs of one tick."""
        self._ticks.append(programs)

    def wait(self, allowed: int) -> None:
        """Waits until fewer than ``allowed`` ticks are pending; 0: none.

        Raises:
          StageError: a program failed.
          NonFiniteError: a value was not finite, and ``stop``.
        """
        while self._ticks and len(self._ticks) >= allowed:
            self._look([p for p in self._ticks.popleft() if self._stages[p.stage].here])

    def _look(self, done: list[Done]) -> None:
        """Waits for the programs of a tick and checks their results."""
        for program in done:
            try:
                jax.block_until_ready(program.token)
            except Exception as error:
                self._ticks.clear()
                k, what, batch, _ = program
                raise failure(self._stages, k, what, batch, error) from error
        if self._stop:
            # They have ended, so fetching their records does not wait.
            records = jax.device_get([program.token for program in done])
            for program, record in zip(done, records, strict=True):
                if max(record[[nonfinite.FORWARD, nonfinite.BACKWARD]]) >= 0:
                    self._ticks.clear()
                    raise self._nonfinite(program, record)

    def _nonfinite(self, program: Done, record: np.ndarray) -> NonFiniteError:
        k, stage = program.stage, self._stages[program.stage]
        what = "output or model state"
        if stage.loss_fn is not None:
            what = "loss or model state"
        n = record[nonfinite.FORWARD]
        if n < 0:
            what, n = "gradient or update", record[nonfinite.BACKWARD]
        batch = int(n) // self._microbatches
        return NonFiniteError(
            f"mini-batch {batch}: {what} of stage {k} ({stage.layers}) is not finite", k, batch
        )
