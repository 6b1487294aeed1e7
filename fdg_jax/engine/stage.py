"""One stage: its devices, its jitted programs, and its initial state.

The pure functions of programs.py become jitted programs over the stage's own mesh. An update right
after its backward is compiled with it, and in the last stage forward, loss, backward and update of
one batch are a single program, as in an ordinary training step.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fdg_jax.engine import remote_stage
from fdg_jax.engine.encoded_programs import EncodedFunctions
from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.loss import average
from fdg_jax.engine.network_optimizer import NetworkOptimizer
from fdg_jax.engine.placement import absent, put
from fdg_jax.engine.state import Slots
from fdg_jax.engine.synthesizer import Output, Synthesizer, SynthesizerState
from fdg_jax.layer import Layer, batch_key
from fdg_jax.typing import Key, LossOfPart, PyTree


class Stage(EncodedFunctions):
    """One stage of a pipeline: pure functions, jitted over the stage's own mesh.

    Args:
      layer: the stage's part of the network, already numbered (`Layer.at`).
      optimizer: the stage's optimizer.
      mesh: the stage's devices, one axis.
      start: number of the stage's first layer in the network.
      rule: selects the weights of a backward and the data stored for it.
      loss_fn: the stage's loss, or None.
      last: whether it is the last stage.
      sends: whether its backward sends a message to the previous stage; if not, the gradient of its
        input is not computed.
      synthesizer: predicts the cotangent of the stage's output, or None.
      shard_optimizer: whether the optimizer state is sharded over the devices (stage 1 of ZeRO,
        Rajbhandari et al. 2020, section 5.1).
      message_dtype: dtype of messages to neighbouring stages; None: not encoded.
    """

    def __init__(
        self,
        layer: Layer,
        optimizer: NetworkOptimizer,
        mesh: Mesh,
        *,
        start: int,
        rule: GradientRule,
        loss_fn: LossOfPart | None,
        last: bool,
        sends: bool,
        shard_optimizer: bool = False,
        synthesizer: Synthesizer | None = None,
        message_dtype: np.dtype | None = None,
    ) -> None:
        super().__init__(
            layer, optimizer, mesh, rule, loss_fn, last, sends, shard_optimizer, synthesizer
        )
        self.message_dtype = message_dtype
        end = start + layer.size - 1
        self.layers = f"layers {start} to {end}" if end > start else f"layer {start}"
        self._scalars: dict[tuple[type, float], jax.Array] = {}

        # Only buffers without other references are donated. Batches in flight may refer to the
        # weights, so the caller chooses the program that donates them only if none does.
        # The number after each function: which output has the batch axis.
        own = ("params", "opt_state")
        program = functools.partial(remote_stage.program, self.replicated, self.places)
        self.forward = program(self._forward, 0)
        self.backward = program(self._backward_accumulate, 2, ("gradient", "per_gradient"))
        self.backward_input = program(self._backward_input, 0)
        self.update = program(self._update, -1, ("opt_state", "gradient"), "mean")
        self.backward_update = program(self._backward_update, 2, ("opt_state",))
        self.backward_update_own = program(self._backward_update_own, 2, own)
        self.train = program(self._train, 5, (*own, "model_state"))
        self.predict = program(self._predict, 0)
        self.teach = program(self._teach, -1, ("synthesizer",))
        self.evaluate = program(self._evaluate, None)
        self.evaluate_at = program(self._evaluate_at, None)
        self.true_params = program(self._true_params, -1)
        self.averaged_params = program(self._averaged_params, -1)
        self.past_params = program(self._past_params, -1)
        self.split = program(self._split, None, (), "count")
        self.average = jax.jit(average)

    def _past_params(
        self, params: PyTree, opt_state: PyTree, updates_ago: jax.Array
    ) -> tuple[PyTree]:
        place = self.optimizer.place
        past = self.rule.past_params(place.whole(params), opt_state, updates_ago)
        return (self._whole(place.own(past)),)

    @property
    def owner(self) -> int:
        """The process that represents the stage: the one with its first device."""
        return int(self.mesh.devices.flat[0].process_index)

    @property
    def labelled(self) -> bool:
        """Whether the stage uses labels."""
        return self.loss_fn is not None or self.synthesizer is not None

    @property
    def here(self) -> bool:
        """Whether this process has some of the stage's devices."""
        return bool(self.mesh.local_devices)

    def number_on_device(self, value: float, dtype: type = np.float32) -> jax.Array:
        """A scalar on the stage's devices; sent once per value."""
        known = self._scalars.get((dtype, value))
        if known is None:
            with jax.ensure_compile_time_eval():  # a constant while a tick is traced
                known = self._scalars[dtype, value] = put(dtype(value), self.replicated)
        return known

    def init(self, key: Key, x: PyTree) -> tuple[PyTree, PyTree, optax.OptState]:
        """Initialises parameters, model state and optimizer state on this stage's devices.

        Args:
          key: the root key.
          x: shapes and dtypes of an input.

        Returns:
          params, model state, optimizer state.
        """
        if not self.here:
            *own, opt_state = self.shapes(x)
            return *absent(own, self.replicated), absent(opt_state, self.shared(opt_state))
        device = self.mesh.local_devices[0]
        with jax.default_device(device), jax.transfer_guard("allow"):
            example = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), x)
            made = self.layer.init(jax.device_put(key, device), example)
            # Copied, because a layer may return the user's arrays, which must not be donated.
            own = jax.device_put(jax.tree.map(jnp.array, made), device)
            if not self.replicated.is_fully_addressable:
                own = jax.device_get(own)
            params, model_state = put(own, self.replicated)
            shared = self.shared(jax.eval_shape(self.optimizer.init, params))
            opt_init = jax.jit(
                lambda p: jax.tree.map(jnp.copy, self.optimizer.init(p)), out_shardings=shared
            )
            opt_state = opt_init(params)
        return params, model_state, opt_state

    def init_synthesizer(self, key: Key, shapes: SynthesizerState | None, own: Output) -> PyTree:
        """Initialises the synthesizer's state on this stage's devices; None if there is none.

        Args:
          key: the root key.
          shapes: shapes, dtypes and shardings of the state.
          own: shapes and dtypes of an output.
        """
        if self.synthesizer is None or not self.here:
            return None if shapes is None else absent(shapes, self.replicated)
        synthesizer, device = self.synthesizer, self.mesh.local_devices[0]
        with jax.default_device(device), jax.transfer_guard("allow"):
            # Compiled, so that none of its arrays has other references: they will be donated.
            init = jax.jit(lambda key: synthesizer.init(key, own))
            made = jax.tree.map(jnp.copy, init(jax.device_put(key, device)))
            if not self.replicated.is_fully_addressable:
                made = jax.device_get(made)
            return put(made, self.replicated)

    def shapes(self, x: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """Shapes and dtypes of the result of `init` for inputs like ``x``; computes nothing."""
        params, model_state = jax.eval_shape(self.layer.init, jax.random.key(0), x)
        opt_state = jax.eval_shape(self.optimizer.init, params)
        return params, model_state, opt_state

    def output(
        self, params: PyTree, model_state: PyTree, x: PyTree, key: Key, number: jax.Array
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Shapes and dtypes of output, inputs of a loss, and new model state in training; computes
        nothing."""

        def apply(
            params: PyTree, model_state: PyTree, x: PyTree, key: Key, number: jax.Array
        ) -> Any:
            noise = batch_key(key, number)
            y, new = self.layer.apply(params, model_state, x, train=True, key=noise)
            return y, *self.layer.scores(params, new, y, train=True, key=noise)

        made: tuple[PyTree, PyTree, PyTree] = jax.eval_shape(
            apply, params, model_state, x, key, number
        )
        return made

    def zeros(self, tree: PyTree) -> PyTree:
        """Zeros with the shapes, dtypes and placement of a pytree of this stage."""
        return jax.tree.map(_zeros, tree)

    def zeros_of(self, slots: Slots) -> Slots:
        """Empty slots with the shapes of a template; all share one value."""
        if not slots.values:
            return slots
        return Slots(slots.numbers, (self.zeros(slots.values[0]),) * len(slots.values))


def _zeros(leaf: Any) -> jax.Array:
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    zeros = jnp.zeros(leaf.shape, leaf.dtype) if key else np.zeros(leaf.shape, leaf.dtype)
    made: jax.Array = put(zeros, leaf.sharding)
    return made
