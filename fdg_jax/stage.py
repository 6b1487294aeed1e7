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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdg_jax.layer import Key, Layer, LossFn, PyTree, batch_key
from fdg_jax.placement import BATCH_AXIS


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["structure"]
)
@dataclass(frozen=True)
class Residuals:
    """What the backward needs of the forward, less the weights and the input.

    Most residuals of a layer are its weights and its input. Both are kept anyway (the weight
    version is shared by all batches that met it), so here they are only pointed to.

    Attributes:
      arrays: the other leaves of the VJP.
      structure: how to put the VJP together again: its tree structure, and for each leaf its
        position among the leaves of (params, inputs), or -1 for the next of `arrays`.
    """

    arrays: list[jax.Array]
    structure: Any

    @staticmethod
    def of(vjp: PyTree, kept: PyTree) -> Residuals:
        position = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(kept))}
        leaves, treedef = jax.tree.flatten(vjp)
        sources = tuple(position.get(id(leaf), -1) for leaf in leaves)
        arrays = [leaf for leaf, i in zip(leaves, sources, strict=True) if i < 0]
        return Residuals(arrays, (treedef, sources))

    def vjp(self, kept: PyTree) -> Callable[[PyTree], tuple[PyTree, ...]]:
        treedef, sources = self.structure
        leaves, rest = jax.tree.leaves(kept), iter(self.arrays)
        return jax.tree.unflatten(treedef, [leaves[i] if i >= 0 else next(rest) for i in sources])


def split_inexact(tree: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """The leaves of ``tree`` that have a gradient, and a function that puts such leaves back."""
    leaves, structure = jax.tree.flatten(tree)
    moving = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def join(values: list[jax.Array]) -> PyTree:
        full = list(leaves)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in moving], join


class Stage:
    """One stage of a pipeline: pure functions, jitted over the stage's own mesh.

    Args:
      layer: the stage's part of the network, already numbered (`Layer.at`).
      optimizer: of this stage's parameters.
      mesh: the stage's devices, one axis.
      first: whether it is next to the input: then nobody asks for the input's gradient.
      loss_fn: of the last stage, else None.
    """

    def __init__(
        self,
        layer: Layer,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        *,
        first: bool,
        loss_fn: LossFn | None,
    ) -> None:
        self.layer = layer
        self.optimizer = optimizer
        self.mesh = mesh
        self.first = first
        self.loss_fn = loss_fn
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.sharded = NamedSharding(mesh, PartitionSpec(BATCH_AXIS))

        # Donation: only what nothing else can hold. Weights are held by the batches in flight, so
        # the caller says (by the program it calls) when a stage's weights are its own alone.
        self.forward = jax.jit(self._forward)
        self.backward = jax.jit(self._backward_accumulate, donate_argnames="gradient")
        self.update = jax.jit(self._update, donate_argnames=("opt_state", "gradient"))
        self.backward_update = jax.jit(self._backward_update, donate_argnames="opt_state")
        self.backward_update_own = jax.jit(
            self._backward_update_own, donate_argnames=("params", "opt_state")
        )
        self.train = jax.jit(self._train, donate_argnames=("params", "model_state", "opt_state"))
        self.evaluate = jax.jit(self._evaluate)

    def init(self, key: Key, x: PyTree) -> tuple[PyTree, PyTree, optax.OptState, PyTree]:
        """Parameters, model state and optimizer state, born on this stage's devices.

        Args:
          key: the root key.
          x: shapes and dtypes of an input.

        Returns:
          params, model state, optimizer state, and the shapes and dtypes of the output.
        """
        device = self.mesh.devices.flat[0]
        with jax.default_device(device), jax.transfer_guard("allow"):
            example = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), x)
            made = self.layer.init(jax.device_put(key, device), example)
            # A layer may return arrays of its user's: donation must not delete those.
            own = jax.device_put(jax.tree.map(jnp.array, made), device)
            params, model_state = jax.device_put(own, self.replicated)
            opt_init = jax.jit(lambda p: jax.tree.map(jnp.copy, self.optimizer.init(p)))
            opt_state = jax.device_put(opt_init(params), self.replicated)
        y = jax.eval_shape(
            lambda p, s, v: self.layer.apply(p, s, v, train=False, key=None)[0],
            params,
            model_state,
            x,
        )
        return params, model_state, opt_state, y

    # Pure functions. `number` counts this stage's forwards; it seeds the batch's noise, and its
    # successor is the small token by which the host sees that a program has ended.

    def _forward(
        self,
        params: PyTree,
        model_state: PyTree,
        inputs: PyTree,
        labels: PyTree,
        key: Key,
        number: jax.Array,
    ) -> tuple[PyTree, PyTree, jax.Array, Residuals]:
        """Output, new model state, number + 1, residuals.

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
            return loss, (({"loss": loss, **metrics}, jnp.ones_like(loss)), new_state)

        if self.first:
            _, vjp, (y, new_state) = jax.vjp(lambda p: outputs(p, moving), params, has_aux=True)
        else:
            _, vjp, (y, new_state) = jax.vjp(outputs, params, moving, has_aux=True)
        return y, self._whole(new_state), number + 1, Residuals.of(vjp, (params, inputs))

    def _backward(
        self, params: PyTree, inputs: PyTree, residuals: Residuals, cotangent: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Gradient of the parameters, and the cotangent of the input (None in the first stage)."""
        gradient, *of_inputs = residuals.vjp((params, inputs))(cotangent)
        return self._whole(gradient), self._over_batch(of_inputs[0]) if of_inputs else None

    def _backward_accumulate(
        self,
        params: PyTree,
        inputs: PyTree,
        residuals: Residuals,
        cotangent: PyTree,
        number: jax.Array,
        gradient: PyTree,
    ) -> tuple[PyTree, PyTree, jax.Array]:
        """Gradient added to what is there (None: nothing yet), cotangent of the input, token."""
        new, of_inputs = self._backward(params, inputs, residuals, cotangent)
        total = new if gradient is None else jax.tree.map(jnp.add, gradient, new)
        return total, of_inputs, number + 1

    def _apply(
        self, params: PyTree, opt_state: optax.OptState, gradient: PyTree
    ) -> tuple[PyTree, optax.OptState]:
        updates, opt_state = self.optimizer.update(gradient, opt_state, params)
        return self._whole(optax.apply_updates(params, updates)), self._whole(opt_state)

    def _update(
        self, params: PyTree, opt_state: optax.OptState, gradient: PyTree, held: jax.Array
    ) -> tuple[PyTree, optax.OptState]:
        """One update with the mean of ``held`` accumulated gradients."""
        mean = jax.tree.map(lambda g: g / held.astype(g.dtype), gradient)
        return self._apply(params, opt_state, mean)

    def _backward_update(
        self,
        params: PyTree,
        forward_params: PyTree,
        opt_state: optax.OptState,
        inputs: PyTree,
        residuals: Residuals,
        cotangent: PyTree,
        number: jax.Array,
    ) -> tuple[PyTree, optax.OptState, PyTree, jax.Array]:
        """Backward at the weights of the batch's forward, update of today's."""
        gradient, of_inputs = self._backward(forward_params, inputs, residuals, cotangent)
        return *self._apply(params, opt_state, gradient), of_inputs, number + 1

    def _backward_update_own(
        self, params: PyTree, opt_state: optax.OptState, *rest: PyTree
    ) -> tuple[PyTree, optax.OptState, PyTree, jax.Array]:
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
    ) -> tuple[PyTree, PyTree, optax.OptState, PyTree, PyTree, jax.Array]:
        """The last stage's forward, loss, backward and update of one batch."""
        (metrics, one), model_state, number, residuals = self._forward(
            params, model_state, inputs, labels, key, number
        )
        gradient, of_inputs = self._backward(params, inputs, residuals, one)
        params, opt_state = self._apply(params, opt_state, gradient)
        return params, model_state, opt_state, metrics, of_inputs, number

    def _evaluate(self, params: PyTree, model_state: PyTree, inputs: PyTree) -> PyTree:
        y, _ = self.layer.apply(params, model_state, inputs, train=False, key=None)
        return self._over_batch(y)

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
