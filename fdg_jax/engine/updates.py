"""Gradient corrections, updates, and the weights behind predictions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fdg_jax.engine import nonfinite
from fdg_jax.engine.network_optimizer import NetworkOptimizer
from fdg_jax.engine.placement import Placed
from fdg_jax.typing import PyTree


class Updates(Placed):
    """The updates of one stage, as pure functions.

    Args:
      optimizer: the stage's optimizer, with a part per gradient and a part per update.
      mesh: the stage's devices, one axis.
      shard_optimizer: whether the optimizer state is sharded over the devices.
    """

    def __init__(self, optimizer: NetworkOptimizer, mesh: Mesh, shard_optimizer: bool) -> None:
        super().__init__(mesh, shard_optimizer)
        self.optimizer = optimizer

    def correct(
        self, params: PyTree, opt_state: PyTree, gradient: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """Applies the per-gradient part: the corrected gradient and the optimizer's state."""
        if self.optimizer.per_gradient is None:
            return gradient, opt_state
        first, second = opt_state
        gradient, first = self.optimizer.per_gradient.update(gradient, first, params, **extra)
        return gradient, (first, second)

    def apply(
        self, params: PyTree, opt_state: PyTree, gradient: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """One update with a gradient, or with the sum or mean of several."""
        updates, opt_state = self.optimizer.update(gradient, opt_state, params, **extra)
        if self.mesh.size > 1:
            opt_state = jax.lax.with_sharding_constraint(opt_state, self.shared(opt_state))
        return self._whole(optax.apply_updates(params, updates)), opt_state

    def apply_one(
        self, params: PyTree, opt_state: PyTree, gradient: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """An update with one gradient: per-gradient correction, then the update."""
        gradient, opt_state = self.correct(params, opt_state, gradient, **extra)
        return self.apply(params, opt_state, gradient, **extra)

    def _update(
        self,
        params: PyTree,
        opt_state: PyTree,
        gradient: PyTree,
        held: jax.Array,
        record: nonfinite.Record,
        weight: jax.Array | None,
        mean: bool,
    ) -> tuple[PyTree, PyTree, jax.Array, nonfinite.Record]:
        """One update with the sum or mean of ``held`` gradients, and a token. With a weight they
        are gradients of loss sums, and their mean is the sum divided by that weight."""
        count = held if record is None else held - record[nonfinite.PENDING]
        divisor = jnp.maximum(count, 1) if mean else jnp.ones_like(count)
        if weight is not None:
            divisor = divisor * weight / jnp.maximum(count, 1)
        reduced = jax.tree.map(lambda g: g / divisor.astype(g.dtype), gradient)
        new, new_opt = self.apply(params, opt_state, reduced)
        if record is not None:
            ok = (count > 0) & nonfinite.finite(nonfinite.changed(new, params))
            new, new_opt = nonfinite.choose(ok, (new, new_opt), (params, opt_state))
            out = jnp.where(ok, record[nonfinite.PENDING], held)
            record = record.at[nonfinite.SKIPPED].add(out).at[nonfinite.PENDING].set(0)
        return new, new_opt, held + 1, record

    def _true_params(self, params: PyTree, opt_state: PyTree) -> tuple[PyTree]:
        return (self._whole(self.optimizer.true_params(params, opt_state)),)

    def _averaged_params(self, params: PyTree, opt_state: PyTree) -> tuple[PyTree]:
        return (self._whole(self.optimizer.averaged_params(params, opt_state)),)
