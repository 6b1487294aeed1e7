"""Loss and error of a state on the held-out images."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np

import fdg_jax as fdg
from experiments import data
from experiments.training import setup
from experiments.training.setup import Setup
from fdg_jax import distributed
from fdg_jax.engine.placement import put


class Evaluation:
    """Loss and error over the test (or validation) split, in evaluation mode."""

    def __init__(self, run: Setup, mean: jax.Array, std: jax.Array) -> None:
        self.run = run
        self.mean, self.std = mean, std
        self.normalise = jax.jit(data.normalise)

        @jax.jit
        def totals(outputs: jax.Array, labels: jax.Array, count: jax.Array) -> jax.Array:
            real = jnp.arange(len(labels)) < count
            losses = jax.vmap(lambda y, t: setup.loss_fn(y[None], t[None])[0])(outputs, labels)
            wrong = jnp.argmax(outputs, axis=-1) != labels
            return jnp.stack([jnp.sum(losses * real), jnp.sum(wrong * real)])

        self.totals = totals

    def __call__(self, state: fdg.PipelineState) -> dict[str, float]:
        pipe, dataset = self.run.pipe, self.run.dataset
        first, last = pipe.stages[0], pipe.stages[-1]
        sums, pending = np.zeros(2), collections.deque[tuple[jax.Array, jax.Array]]()

        def count_oldest() -> None:
            # The first stage waits too, lest its process run far ahead of the others.
            there, back = pending.popleft()
            jax.block_until_ready(back)
            if last.here:
                np.add(sums, jax.device_get(there), out=sums)

        for images, labels, count in data.evaluation_batches(
            dataset.test_images, dataset.test_labels, self.run.config.batch_size
        ):
            x = self.normalise(put(images, first.sharded), self.mean, self.std)
            outputs = pipe.predict(state, x)
            targets, real = put((labels, np.int32(count)), (last.sharded, last.replicated))
            found = self.totals(outputs, targets, real)
            pending.append((found, jax.device_put(found, first.replicated)))
            if len(pending) > self.run.config.max_ahead:
                count_oldest()
        while pending:
            count_oldest()
        # All processes decide by it; exactly, and so in two halves of 32 bits.
        halves = distributed.gather(sums.view(np.uint32))[last.owner]
        loss, error = (float(v) for v in halves.view(np.float64) / len(dataset.test_labels))
        return {"loss": loss, "error": error}
