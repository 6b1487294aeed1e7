"""Loss and error of a state on held-out data."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np

import fdg_jax as fdg
from experiments import data
from experiments.training.setup import Setup
from fdg_jax import distributed
from fdg_jax.engine.placement import put


def every(run: Setup) -> int:
    """Steps between evaluations."""
    config = run.config
    in_epochs = round(config.eval_every_epochs * run.task.loader.steps_per_epoch)
    return config.eval_every_steps or max(1, in_epochs)


class Evaluation:
    """Loss and error over a task's held-out data, in evaluation mode."""

    def __init__(self, run: Setup) -> None:
        self.run = run
        self.inputs = run.task.evaluation_inputs(run.pipe.stages[0])
        loss_fn = run.task.loss_fn

        @jax.jit
        def totals(outputs: jax.Array, labels: jax.Array, count: jax.Array) -> jax.Array:
            real = jnp.arange(len(labels)) < count
            losses, metrics = jax.vmap(loss_fn)(outputs, labels)
            return jnp.stack([jnp.sum(losses * real), jnp.sum(metrics["error"] * real)])

        self.totals = totals

    def __call__(self, state: fdg.PipelineState) -> dict[str, float]:
        pipe, config = self.run.pipe, self.run.config
        first, last = pipe.stages[0], pipe.stages[-1]
        sums, pending = np.zeros(2), collections.deque[tuple[jax.Array, jax.Array]]()

        def count_oldest() -> None:
            # The first stage waits, too, so that its process does not run far ahead.
            there, back = pending.popleft()
            jax.block_until_ready(back)
            if last.here:
                np.add(sums, jax.device_get(there), out=sums)

        params = pipe.averaged_params(state) if config.average_decay else None
        examples = self.run.task.held_out
        for x, labels, count in data.evaluation_batches(*examples, config.batch_size):
            outputs = pipe.predict(state, self.inputs(x), params)
            targets, real = put((labels, np.int32(count)), (last.sharded, last.replicated))
            found = self.totals(outputs, targets, real)
            pending.append((found, jax.device_put(found, first.replicated)))
            if len(pending) > config.max_ahead:
                count_oldest()
        while pending:
            count_oldest()
        # All processes need the exact result, sent as two halves of 32 bits.
        halves = distributed.gather(sums.view(np.uint32))[last.owner]
        loss, error = (float(v) for v in halves.view(np.float64) / len(examples[1]))
        return {"loss": loss, "error": error}
