"""The computations of a stage as pure functions: forward, backward, and update.

    inputs ──► forward ──► output            params, model_state, opt_state
                  │                          live on this stage's devices and never leave
              residuals ──► backward ──► message: cotangent of inputs
                               │
                            gradient ──► update (updates.py)

`number` counts the stage's forwards and seeds the batch's noise; number + 1 is the token that tells
the host that a program has ended. Every function takes and returns a record (nonfinite.py). With
it, non-finite values leave weights, optimizer state and model state unchanged; without it (None),
nothing is checked.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fdg_jax.engine import nonfinite
from fdg_jax.engine.dependence import depends
from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.network_optimizer import NetworkOptimizer
from fdg_jax.engine.residuals import Residuals, Stash, split_inexact
from fdg_jax.engine.synthesizer import Output, Synthesizer, SynthesizerState
from fdg_jax.engine.updates import Updates
from fdg_jax.layer import Layer, batch_key
from fdg_jax.shared import is_shared, plain
from fdg_jax.tie import Paired, TiedArray, value_of
from fdg_jax.tied_stage import Tied
from fdg_jax.typing import Key, LossOfPart, PyTree


class Forward(NamedTuple):
    """The results of a forward.

    Attributes:
      output: for the next stage; None in the last.
      report: loss and metrics, if the stage has a loss.
      one: the cotangent of the loss, if the stage has a loss.
      model_state: the new model state.
      number: number of the next forward.
      residuals: None if not stored.
      kept: data stored instead of the input; None: the input.
      record: of non-finite values.
    """

    output: PyTree
    report: PyTree
    one: PyTree
    model_state: PyTree
    number: jax.Array
    residuals: Residuals | None
    kept: PyTree
    record: nonfinite.Record


class Functions(Updates):
    """The pure functions of one stage.

    Args:
      layer: the stage's part of the network, already numbered (`Layer.at`).
      optimizer: the stage's optimizer, with a part per gradient and a part per update.
      mesh: the stage's devices, one axis.
      rule: selects the weights of a backward and the data stored for it.
      loss_fn: the stage's loss, or None.
      last: whether it is the last stage.
      synthesizer: predicts the cotangent of the stage's output, or None.
      sends: whether its backward sends a message to the previous stage.
      shard_optimizer: whether the optimizer state is sharded over the devices.
    """

    def __init__(
        self,
        layer: Layer,
        optimizer: NetworkOptimizer,
        mesh: Mesh,
        rule: GradientRule,
        loss_fn: LossOfPart | None,
        last: bool,
        sends: bool,
        shard_optimizer: bool,
        synthesizer: Synthesizer | None,
    ) -> None:
        super().__init__(optimizer, mesh, shard_optimizer)
        self.synthesizer = synthesizer
        self.layer = layer
        self.rule = rule
        self.loss_fn = loss_fn
        self.last = last
        self.sends = sends

    def _linearise(
        self,
        params: PyTree,
        model_state: PyTree,
        inputs: PyTree,
        labels: PyTree,
        key: Key,
        number: jax.Array,
        guarded: bool = False,
    ) -> tuple[PyTree, PyTree, PyTree, PyTree, list[jax.Array], PyTree, Residuals]:
        """Output, loss and metrics, cotangent of the loss, new model state, values to check for
        finiteness (complete only if guarded), data stored instead of the input, residuals."""
        moving, join = split_inexact(inputs)

        def outputs(params: PyTree, moving: list[jax.Array]) -> tuple[PyTree, tuple[PyTree, ...]]:
            x = join(moving)
            noise = batch_key(key, number)
            y, new_state, kept = self.rule.apply(self.layer, params, model_state, x, noise)
            if self.loss_fn is None:
                made: list[jax.Array] = []
                if guarded:
                    apply = functools.partial(self.rule.apply, self.layer)
                    learnt = depends(lambda *a: apply(*a)[0], params, model_state, x, noise)
                    made = nonfinite.computed(y, (model_state, x), learnt)
                    made += jax.tree.leaves(nonfinite.changed(new_state, model_state))
                up = self._over_batch(y)
                return split_inexact(y)[0], (up, None, None, new_state, made, kept)
            scores, new_state = self.layer.scores(params, new_state, y, train=True, key=noise)
            loss, metrics = self.loss_fn(scores, labels)
            made = [loss]
            if guarded:
                made += jax.tree.leaves(nonfinite.changed(new_state, model_state))
            up = None if self.last else self._over_batch(jax.lax.stop_gradient(y))
            return loss, (up, (loss, metrics), jnp.ones_like(loss), new_state, made, kept)

        if self.sends:
            _, vjp, aux = jax.vjp(outputs, params, moving, has_aux=True)
        else:
            _, vjp, aux = jax.vjp(lambda p: outputs(p, moving), params, has_aux=True)
        y, report, one, new_state, made, kept = aux
        kept = self._over_batch(kept)
        residuals = Residuals.of(vjp, (params, inputs))
        return y, report, one, self._whole(new_state), made, kept, residuals

    def _forward(
        self,
        params: PyTree,
        model_state: PyTree,
        inputs: PyTree,
        labels: PyTree,
        key: Key,
        number: jax.Array,
        record: nonfinite.Record,
    ) -> Forward:
        y, report, one, new_state, made, kept, residuals = self._linearise(
            params, model_state, inputs, labels, key, number, record is not None
        )
        if record is not None:
            ok = nonfinite.finite(made)
            new_state = nonfinite.choose(ok, new_state, model_state)
            record = nonfinite.note(record, nonfinite.FORWARD, ok, number)
        left = residuals if self.rule.keeps_residuals else None
        return Forward(y, report, one, new_state, number + 1, left, kept, record)

    def _backward(
        self, params: PyTree, stash: Stash, key: Key, message: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Gradient of the parameters and message to the previous stage, None if it sends none."""
        gradient, down = self.rule.backward(self, params, stash, key, value_of(message))
        if isinstance(message, Paired) and isinstance(self.layer, Tied):
            gradient = self.layer.add(gradient, message.tied)
        return self._whole(gradient), self._over_batch(down)

    def pull_back(
        self, params: PyTree, stash: Stash, key: Key, message: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The same from residuals, or from a recomputed forward."""
        residuals = stash.residuals
        if residuals is None:
            # The model state of this second forward is dropped; the first has updated it.
            *_, residuals = self._linearise(
                params, stash.model_state, stash.inputs, stash.labels, key, stash.number
            )
        cotangent = message if self.loss_fn is not None else self.rule.cotangent(message)
        gradient, *of_inputs = residuals.vjp((params, stash.inputs))(cotangent)
        if not of_inputs:
            return gradient, None
        x, cotangents = stash.inputs, of_inputs[0]
        if not isinstance(x, Paired):
            return gradient, self.rule.message(x, cotangents)
        *own, tied = cotangents  # in the order of the input's leaves
        return gradient, Paired(self.rule.message(x.value, own), TiedArray(tied))

    def _backward_accumulate(
        self,
        params: PyTree,
        newest: PyTree,
        per_gradient: PyTree,
        stash: Stash,
        key: Key,
        message: PyTree,
        gradient: PyTree,
        staleness: jax.Array,
        record: nonfinite.Record,
    ) -> tuple[PyTree, PyTree, PyTree, jax.Array, nonfinite.Record]:
        """Accumulated gradient (None before the first), state of the optimizer's part per gradient,
        message, token, record."""
        new, down = self._backward(params, stash, key, message)
        kept = per_gradient
        if self.optimizer.per_gradient is not None:
            new, kept = self.optimizer.per_gradient.update(
                new, per_gradient, newest, stale_params=params, staleness=staleness
            )
        if record is not None:
            ok = nonfinite.finite(new)
            new = nonfinite.choose(ok, new, jax.tree.map(jnp.zeros_like, new))
            kept = nonfinite.choose(ok, kept, per_gradient)
            record = nonfinite.leave_out(record, ok, stash.number, nonfinite.PENDING)
        total = new if gradient is None else jax.tree.map(jnp.add, gradient, new)
        return total, kept, down, stash.number + 1, record

    def _backward_input(
        self, params: PyTree, stash: Stash, key: Key, message: PyTree
    ) -> tuple[PyTree, jax.Array]:
        """Message and token; XLA eliminates the weight gradient."""
        return self._backward(params, stash, key, message)[1], stash.number + 1

    def _backward_update(
        self,
        params: PyTree,
        backward_params: PyTree,
        opt_state: PyTree,
        stash: Stash,
        key: Key,
        message: PyTree,
        staleness: jax.Array,
        record: nonfinite.Record,
    ) -> tuple[PyTree, PyTree, PyTree, jax.Array, nonfinite.Record]:
        """Backward at any weight version, update of the newest."""
        gradient, down = self._backward(backward_params, stash, key, message)
        extra = {"stale_params": backward_params, "staleness": staleness}
        new, new_opt = self.apply_one(params, opt_state, gradient, **extra)
        if record is not None:
            ok = nonfinite.finite(gradient, nonfinite.changed(new, params))
            new, new_opt = nonfinite.choose(ok, (new, new_opt), (params, opt_state))
            record = nonfinite.leave_out(record, ok, stash.number, nonfinite.SKIPPED)
        return new, new_opt, down, stash.number + 1, record

    def _backward_update_own(
        self, params: PyTree, opt_state: PyTree, *rest: PyTree
    ) -> tuple[PyTree, PyTree, PyTree, jax.Array, nonfinite.Record]:
        """The same if both are one version without other references, so it can be donated."""
        return self._backward_update(params, params, opt_state, *rest)

    def _train(
        self,
        params: PyTree,
        model_state: PyTree,
        opt_state: PyTree,
        inputs: PyTree,
        labels: PyTree,
        key: Key,
        number: jax.Array,
        staleness: jax.Array,
        record: nonfinite.Record,
    ) -> tuple[PyTree, PyTree, PyTree, PyTree, PyTree, PyTree, jax.Array, nonfinite.Record]:
        """Forward, loss, backward and update of one batch, in a stage with a loss."""
        y, report, one, new_state, made, _, residuals = self._linearise(
            params, model_state, inputs, labels, key, number, record is not None
        )
        stash = Stash(inputs, labels, model_state, number, residuals)
        gradient, down = self._backward(params, stash, key, one)
        extra = {"stale_params": params, "staleness": staleness}
        new, new_opt = self.apply_one(params, opt_state, gradient, **extra)
        if record is not None:
            ok = nonfinite.finite(made)
            record = nonfinite.note(record, nonfinite.FORWARD, ok, number)
            new_state = nonfinite.choose(ok, new_state, model_state)
            ok = nonfinite.finite(gradient, nonfinite.changed(new, params))
            new, new_opt = nonfinite.choose(ok, (new, new_opt), (params, opt_state))
            record = nonfinite.leave_out(record, ok, number, nonfinite.SKIPPED)
        return new, new_state, new_opt, y, report, down, number + 1, record

    def _predict(
        self, params: PyTree, state: PyTree, own: Output, key: Key
    ) -> tuple[list[jax.Array]]:
        """The cotangent predicted by the synthesizer."""
        assert self.synthesizer is not None
        return (self._over_batch(self.synthesizer.predict(params, state, own, key)[0]),)

    def _teach(
        self, synthesizer: SynthesizerState, own: Output, key: Key, cotangent: list[jax.Array]
    ) -> tuple[SynthesizerState, jax.Array]:
        """One update of the synthesizer, and a token."""
        assert self.synthesizer is not None
        new = self.synthesizer.teach(synthesizer, own, cotangent, key)
        return self._whole(new), own.number + 1

    def _evaluate(
        self, params: PyTree, opt_state: PyTree, model_state: PyTree, inputs: PyTree
    ) -> PyTree:
        (params,) = self._true_params(params, opt_state)
        return self._evaluate_at(params, model_state, inputs)

    def _evaluate_at(self, params: PyTree, model_state: PyTree, inputs: PyTree) -> PyTree:
        y, _ = self.layer.apply(params, model_state, inputs, train=False, key=None)
        return self._over_batch(y)

    def _split(self, tree: PyTree, count: int) -> list[PyTree]:
        """Splits a mini-batch into ``count`` micro-batches; shared arrays go to each."""

        def part(leaf: PyTree, i: int) -> PyTree:
            if is_shared(leaf) or not leaf.ndim:
                return plain(leaf)
            size = leaf.shape[0] // count
            return leaf[i * size : (i + 1) * size]

        return [
            self._over_batch(jax.tree.map(lambda leaf, i=i: part(leaf, i), tree, is_leaf=is_shared))
            for i in range(count)
        ]
