"""One stage: its mesh, and its jitted forward, backward and update.

    inputs ──► forward ──► output            params, model_state, opt_state
                  │                          live on this stage's devices and never leave
              residuals ──► backward ──► cotangent of inputs
                               │
                            gradient ──► update

The three are pure functions. The programs below are their compositions: an update that follows its
backward at once is compiled with it, and in the last stage forward, loss, backward and update of
one batch are a single program, the same as an ordinary training step.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdg_jax.engine import nonfinite, remote_stage
from fdg_jax.engine.placement import BATCH_AXIS, absent, put, spread
from fdg_jax.engine.residuals import Residuals, Stash, split_inexact
from fdg_jax.layer import Layer, batch_key, output_of
from fdg_jax.optim import true_params
from fdg_jax.typing import Key, LossFn, PyTree


class Stage:
    """One stage of a pipeline: pure functions, jitted over the stage's own mesh.

    Args:
      layer: the stage's part of the network, already numbered (`Layer.at`).
      optimizer: of this stage's parameters.
      mesh: the stage's devices, one axis.
      start: number of the stage's first layer in the network.
      first: whether it is next to the input: then nobody asks for the input's gradient.
      loss_fn: of the last stage, else None.
      keep_residuals: whether a forward leaves its residuals for the backward.
      shard_optimizer: whether the devices share out the optimizer's state (ZeRO's first stage,
        Rajbhandari et al. 2020, section 5.1).

    Programs take and return a record (nonfinite.py). With it, what is not finite leaves weights,
    optimizer state and model state as they are; without (None), nothing is looked at.
    """

    def __init__(
        self,
        layer: Layer,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        *,
        start: int,
        first: bool,
        loss_fn: LossFn | None,
        keep_residuals: bool = True,
        shard_optimizer: bool = False,
    ) -> None:
        self.layer = layer
        end = start + layer.size - 1
        self.layers = f"layers {start} to {end}" if end > start else f"layer {start}"
        self.optimizer = optimizer
        self.mesh = mesh
        self.first = first
        self.loss_fn = loss_fn
        self.keep_residuals = keep_residuals
        self.shard_optimizer = shard_optimizer
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.sharded = NamedSharding(mesh, PartitionSpec(BATCH_AXIS))

        # Donation: only what nothing else can hold. Weights are held by the batches in flight, so
        # the caller says (by the program it calls) when a stage's weights are its own alone.
        # After each: which output has the batch axis.
        own = ("params", "opt_state")
        program = functools.partial(remote_stage.program, self.replicated, self.placement)
        self.forward = program(self._forward, 0)
        self.backward = program(self._backward_accumulate, 1, ("gradient",))
        self.update = program(self._update, -1, ("opt_state", "gradient"), "mean")
        self.backward_update = program(self._backward_update, 2, ("opt_state",))
        self.backward_update_own = program(self._backward_update_own, 2, own)
        self.train = program(self._train, 4, (*own, "model_state"))
        self.evaluate = program(self._evaluate, None)
        self.true_params = program(self._true_params, -1)
        self.split = program(self._split, None, (), "count")
        self.average = jax.jit(lambda trees: jax.tree.map(lambda *v: sum(v) / len(v), *trees))

    @property
    def owner(self) -> int:
        """The process that speaks for the stage: the one with its first device."""
        return int(self.mesh.devices.flat[0].process_index)

    @property
    def here(self) -> bool:
        """Whether this process has some of the stage's devices."""
        return bool(self.mesh.local_devices)

    def init(self, key: Key, x: PyTree) -> tuple[PyTree, PyTree, optax.OptState, PyTree]:
        """Parameters, model state and optimizer state, born on this stage's devices.

        Args:
          key: the root key.
          x: shapes and dtypes of an input.

        Returns:
          params, model state, optimizer state, and the shapes and dtypes of the output.
        """
        if not self.here:
            *own, opt_state, y = self.shapes(x)
            return *absent(own, self.replicated), absent(opt_state, self.shared(opt_state)), y
        device = self.mesh.local_devices[0]
        with jax.default_device(device), jax.transfer_guard("allow"):
            example = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), x)
            made = self.layer.init(jax.device_put(key, device), example)
            # A layer may return arrays of its user's: donation must not delete those.
            own = jax.device_put(jax.tree.map(jnp.array, made), device)
            if not self.replicated.is_fully_addressable:
                own = jax.device_get(own)
            params, model_state = put(own, self.replicated)
            shared = self.shared(jax.eval_shape(self.optimizer.init, params))
            opt_init = jax.jit(
                lambda p: jax.tree.map(jnp.copy, self.optimizer.init(p)), out_shardings=shared
            )
            opt_state = opt_init(params)
        return params, model_state, opt_state, output_of(self.layer, params, model_state, x)

    def shapes(self, x: PyTree) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """Shapes and dtypes of what `init` returns for inputs like ``x``; nothing is computed."""
        params, model_state = jax.eval_shape(self.layer.init, jax.random.key(0), x)
        opt_state = jax.eval_shape(self.optimizer.init, params)
        return params, model_state, opt_state, output_of(self.layer, params, model_state, x)

    def output(
        self, params: PyTree, model_state: PyTree, x: PyTree, key: Key, number: jax.Array
    ) -> PyTree:
        """Shapes and dtypes of the output in training; nothing is computed."""

        def apply(
            params: PyTree, model_state: PyTree, x: PyTree, key: Key, number: jax.Array
        ) -> Any:
            noise = batch_key(key, number)
            return self.layer.apply(params, model_state, x, train=True, key=noise)[0]

        return jax.eval_shape(apply, params, model_state, x, key, number)

    # Pure functions. `number` counts this stage's forwards; it seeds the batch's noise, and its
    # successor is the small token by which the host sees that a program has ended.

    def _linearise(
        self,
        params: PyTree,
        model_state: PyTree,
        inputs: PyTree,
        labels: PyTree,
        key: Key,
        number: jax.Array,
    ) -> tuple[PyTree, PyTree, Residuals]:
        """Output, new model state, residuals.

        The last stage's output is its metrics, and the cotangent of the loss: one.
        """
        moving, join = split_inexact(inputs)

        def outputs(
            params: PyTree, moving: list[jax.Array]
        ) -> tuple[PyTree, tuple[PyTree, PyTree]]:
            x = join(moving)
            y, new_state = self.layer.apply(
                params, model_state, x, train=True, key=batch_key(key, number)
            )
            if self.loss_fn is None:
                return split_inexact(y)[0], (self._over_batch(y), new_state)
            loss, metrics = self.loss_fn(y, labels)
            return loss, (({**metrics, "loss": loss}, jnp.ones_like(loss)), new_state)

        if self.first:
            _, vjp, (y, new_state) = jax.vjp(lambda p: outputs(p, moving), params, has_aux=True)
        else:
            _, vjp, (y, new_state) = jax.vjp(outputs, params, moving, has_aux=True)
        return y, self._whole(new_state), Residuals.of(vjp, (params, inputs))

    def _forward(
        self,
        params: PyTree,
        model_state: PyTree,
        inputs: PyTree,
        labels: PyTree,
        key: Key,
        number: jax.Array,
        record: nonfinite.Record,
    ) -> tuple[PyTree, PyTree, jax.Array, Residuals | None, nonfinite.Record]:
        """Output, new model state, number + 1, residuals if they are kept, record."""
        y, new_state, residuals = self._linearise(params, model_state, inputs, labels, key, number)
        if record is not None:
            ok = nonfinite.finite(y, new_state)
            new_state = nonfinite.choose(ok, new_state, model_state)
            record = nonfinite.note(record, nonfinite.FORWARD, ok, number)
        return y, new_state, number + 1, residuals if self.keep_residuals else None, record

    def _backward(
        self, params: PyTree, stash: Stash, key: Key, cotangent: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Gradient of the parameters, and the cotangent of the input (None in the first stage)."""
        residuals = stash.residuals
        if residuals is None:
            # The statistics that this second forward would leave are dropped: they have been
            # updated at the first.
            _, _, residuals = self._linearise(
                params, stash.model_state, stash.inputs, stash.labels, key, stash.number
            )
        gradient, *of_inputs = residuals.vjp((params, stash.inputs))(cotangent)
        return self._whole(gradient), self._over_batch(of_inputs[0]) if of_inputs else None

    def _backward_accumulate(
        self,
        params: PyTree,
        stash: Stash,
        key: Key,
        cotangent: PyTree,
        gradient: PyTree,
        record: nonfinite.Record,
    ) -> tuple[PyTree, PyTree, jax.Array, nonfinite.Record]:
        """Gradient added to what is there (None: nothing), input's cotangent, token, record."""
        new, of_inputs = self._backward(params, stash, key, cotangent)
        if record is not None:
            ok = nonfinite.finite(new)
            new = nonfinite.choose(ok, new, jax.tree.map(jnp.zeros_like, new))
            record = nonfinite.leave_out(record, ok, stash.number, nonfinite.PENDING)
        total = new if gradient is None else jax.tree.map(jnp.add, gradient, new)
        return total, of_inputs, stash.number + 1, record

    def _apply(
        self, params: PyTree, opt_state: optax.OptState, gradient: PyTree
    ) -> tuple[PyTree, optax.OptState]:
        updates, opt_state = self.optimizer.update(gradient, opt_state, params)
        if self.mesh.size > 1:
            opt_state = jax.lax.with_sharding_constraint(opt_state, self.shared(opt_state))
        return self._whole(optax.apply_updates(params, updates)), opt_state

    def _update(
        self,
        params: PyTree,
        opt_state: optax.OptState,
        gradient: PyTree,
        held: jax.Array,
        record: nonfinite.Record,
        mean: bool,
    ) -> tuple[PyTree, optax.OptState, jax.Array, nonfinite.Record]:
        """One update with the sum of ``held`` gradients, or with their mean; and a token."""
        count = held if record is None else held - record[nonfinite.PENDING]
        divisor = jnp.maximum(count, 1) if mean else jnp.ones_like(count)
        reduced = jax.tree.map(lambda g: g / divisor.astype(g.dtype), gradient)
        new, new_opt = self._apply(params, opt_state, reduced)
        if record is not None:
            ok = (count > 0) & nonfinite.finite(new)
            new, new_opt = nonfinite.choose(ok, (new, new_opt), (params, opt_state))
            out = jnp.where(ok, record[nonfinite.PENDING], held)
            record = record.at[nonfinite.LEFT_OUT].add(out).at[nonfinite.PENDING].set(0)
        return new, new_opt, held + 1, record

    def _backward_update(
        self,
        params: PyTree,
        backward_params: PyTree,
        opt_state: optax.OptState,
        stash: Stash,
        key: Key,
        cotangent: PyTree,
        record: nonfinite.Record,
    ) -> tuple[PyTree, optax.OptState, PyTree, jax.Array, nonfinite.Record]:
        """Backward at some version of the weights, update of today's."""
        gradient, of_inputs = self._backward(backward_params, stash, key, cotangent)
        new, new_opt = self._apply(params, opt_state, gradient)
        if record is not None:
            ok = nonfinite.finite(gradient, new)
            new, new_opt = nonfinite.choose(ok, (new, new_opt), (params, opt_state))
            record = nonfinite.leave_out(record, ok, stash.number, nonfinite.LEFT_OUT)
        return new, new_opt, of_inputs, stash.number + 1, record

    def _backward_update_own(
        self, params: PyTree, opt_state: optax.OptState, *rest: PyTree
    ) -> tuple[PyTree, optax.OptState, PyTree, jax.Array, nonfinite.Record]:
        """The same where the two are one version, and nothing else holds it."""
        return self._backward_update(params, params, opt_state, *rest)

    def _train(
        self,
        params: PyTree,
        model_state: PyTree,
        opt_state: optax.OptState,
        inputs: PyTree,
        labels: PyTree,
        key: Key,
        number: jax.Array,
        record: nonfinite.Record,
    ) -> tuple[PyTree, PyTree, optax.OptState, PyTree, PyTree, jax.Array, nonfinite.Record]:
        """The last stage's forward, loss, backward and update of one batch."""
        (metrics, one), new_state, residuals = self._linearise(
            params, model_state, inputs, labels, key, number
        )
        stash = Stash(inputs, labels, model_state, number, residuals)
        gradient, of_inputs = self._backward(params, stash, key, one)
        new, new_opt = self._apply(params, opt_state, gradient)
        if record is not None:
            ok = nonfinite.finite(metrics, new_state)
            record = nonfinite.note(record, nonfinite.FORWARD, ok, number)
            new_state = nonfinite.choose(ok, new_state, model_state)
            ok = nonfinite.finite(gradient, new)
            new, new_opt = nonfinite.choose(ok, (new, new_opt), (params, opt_state))
            record = nonfinite.leave_out(record, ok, number, nonfinite.LEFT_OUT)
        return new, new_state, new_opt, metrics, of_inputs, number + 1, record

    def _true_params(self, params: PyTree, opt_state: optax.OptState) -> tuple[PyTree]:
        return (self._whole(true_params(params, opt_state)),)

    def _evaluate(
        self, params: PyTree, opt_state: optax.OptState, model_state: PyTree, inputs: PyTree
    ) -> PyTree:
        (params,) = self._true_params(params, opt_state)
        y, _ = self.layer.apply(params, model_state, inputs, train=False, key=None)
        return self._over_batch(y)

    def _split(self, tree: PyTree, count: int) -> list[PyTree]:
        """A mini-batch as ``count`` micro-batches; a leaf without a batch axis goes to each."""

        def part(leaf: jax.Array, i: int) -> jax.Array:
            if not leaf.ndim:
                return leaf
            size = leaf.shape[0] // count
            return leaf[i * size : (i + 1) * size]

        return [
            self._over_batch(jax.tree.map(lambda leaf, i=i: part(leaf, i), tree))
            for i in range(count)
        ]

    def _whole(self, tree: PyTree) -> PyTree:
        """Replicated over the group."""
        if self.mesh.size == 1:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.replicated)

    def _over_batch(self, tree: PyTree) -> PyTree:
        """Batch axis sharded over the group."""
        if self.mesh.size == 1:
            return tree
        return jax.tree.map(lambda v: jax.lax.with_sharding_constraint(v, self.placement(v)), tree)

    def placement(self, leaf: Any) -> NamedSharding:
        """Where a leaf of an input, label or cotangent of this stage lives."""
        return self.sharded if getattr(leaf, "ndim", 0) else self.replicated

    def shared(self, opt_state: PyTree) -> PyTree:
        """Where the optimizer's state lives."""
        if self.shard_optimizer:
            return spread(opt_state, self.mesh)
        return jax.tree.map(lambda leaf: self.replicated, opt_state)
