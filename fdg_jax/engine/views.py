"""Reading weights, model state, outputs and counts from a pipeline's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fdg_jax.active_mesh import no_active_mesh
from fdg_jax.engine import nonfinite
from fdg_jax.engine.batch_axes import undivided
from fdg_jax.engine.batch_check import check_structure
from fdg_jax.engine.evaluate import evaluate
from fdg_jax.engine.placement import put
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState
from fdg_jax.engine.state_check import READ, check_state
from fdg_jax.layer import Layer
from fdg_jax.partition.layerwise import difference
from fdg_jax.typing import PyTree


class Views:
    """The methods of `fdg_jax.Pipeline` that read states or replace their weights.

    Attributes:
      stages: the stages, input first.
      num_stages: K.
      network: the whole network as one layer, with params ``tuple(pipe.true_params(state))`` and
        state ``tuple(pipe.model_state(state))``, moved to one device.
    """

    stages: list[Stage]
    num_stages: int
    network: Layer
    _inputs: Any

    @no_active_mesh()
    def predict(
        self, state: PipelineState, x: PyTree, params: Sequence[PyTree] | None = None
    ) -> PyTree:
        """The network's outputs in evaluation mode, computed by the stages on their devices.

        Args:
          state: any state; it is not consumed.
          x: inputs, batch axis first.
          params: weights, one pytree per stage, on its devices, for example from
            `averaged_params`. None: the true weights.

        Returns:
          The network's outputs, as asynchronous arrays on the last stage's devices.

        Raises:
          ValueError: the batch does not fit, or cannot be divided over a stage's devices.
          ConsumedStateError: the state has been consumed.
        """
        check_state(state, self.num_stages, READ)
        check_structure(x, self._inputs, "x")
        x = undivided(x, self.stages[0].mesh.size)
        return evaluate(self.stages, state.stages, x, params)

    def params(self, state: PipelineState) -> list[PyTree]:
        """The parameters of each stage, as used by its next forward, on the stage's devices.

        Args:
          state: any state; it is not consumed.

        Returns:
          K pytrees, valid until the next step. With weight prediction (`fdg_jax.predict_weights`)
          they are predicted weights. A tied array is in its owner's stage only.
        """
        check_state(state, self.num_stages, ("params",))
        return [stage.params for stage in state.stages]

    @no_active_mesh()
    def true_params(self, state: PipelineState) -> list[PyTree]:
        """The weights of each stage without prediction, for evaluation and export.

        Args:
          state: any state; it is not consumed.

        Returns:
          K pytrees, on the stages' devices, valid until the next step.
        """
        check_state(state, self.num_stages, READ)
        pairs = zip(self.stages, state.stages, strict=True)
        return [stage.true_params(own.params, own.opt_state)[0] for stage, own in pairs]

    @no_active_mesh()
    def averaged_params(self, state: PipelineState) -> list[PyTree]:
        """The moving average of the weights kept by `fdg_jax.average_weights`.

        Args:
          state: any state; it is not consumed.

        Returns:
          K pytrees, on the stages' devices, valid until the next step.

        Raises:
          ValueError: the optimizer does not keep an average.
        """
        check_state(state, self.num_stages, READ)
        pairs = zip(self.stages, state.stages, strict=True)
        return [stage.averaged_params(own.params, own.opt_state)[0] for stage, own in pairs]

    def skipped(self, state: PipelineState) -> list[int]:
        """The number of non-finite micro-batches skipped by each stage.

        Args:
          state: any state. Waits for it; must be called by every process.

        Returns:
          K counts; zeros without ``on_nonfinite``.
        """
        return nonfinite.skipped([own.record for own in state.stages])

    left_out = skipped  # name in earlier versions

    def model_state(self, state: PipelineState) -> list[PyTree]:
        """The model state of each stage, such as batch statistics, on its devices.

        Args:
          state: any state; it is not consumed.

        Returns:
          K pytrees, valid until the next step.
        """
        check_state(state, self.num_stages, ("model_state",))
        return [stage.model_state for stage in state.stages]

    @no_active_mesh()
    def replace_params(self, state: PipelineState, params: Sequence[PyTree]) -> PipelineState:
        """Replaces the weights of a state, for example by pretrained ones.

        Moments and counts of optimizers are kept; predictions and averages of weights restart.

        Args:
          state: without mini-batches in flight, as returned by `init` and `drain`; consumed.
          params: true weights, one pytree per stage, as returned by `true_params`: JAX or numpy
            arrays, which are copied.

        Returns:
          The new state.

        Raises:
          ValueError: mini-batches are in flight, or structure, shapes or dtypes differ. The state
            remains valid.
          ConsumedStateError: the state has been consumed.

        Example:
          >>> import jax.numpy as jnp, optax
          >>> import fdg_jax as fdg
          >>> layers = [fdg.Layer(lambda key, x: (jnp.ones(()), ()),
          ...                     lambda p, s, x, *, train, key: (p * x, s)) for _ in range(2)]
          >>> pipe = fdg.Pipeline(layers, lambda y, t: (jnp.mean((y - t) ** 2), {}),
          ...                     optax.sgd(0.1), fdg.schedule.fdg(2))
          >>> state = pipe.init(jax.random.key(0), jnp.ones((4, 1)))
          >>> state = pipe.replace_params(state, [jnp.array(2.0), jnp.array(3.0)])
          >>> float(pipe.predict(state, jnp.ones((4, 1)))[0, 0])
          6.0
        """
        check_state(state, self.num_stages)
        for k, own in enumerate(state.stages):
            waiting = [items for slots in own.inbox.values() if (items := slots.items())]
            if own.flights.items() or waiting or own.pending:
                raise ValueError(
                    f"state: mini-batches are in flight in stage {k}, whose gradients would be "
                    "those of the weights before; call drain first"
                )
        if not isinstance(params, Sequence) or len(params) != self.num_stages:
            raise ValueError(
                f"params: must be {self.num_stages} pytrees, one a stage, as true_params returns "
                "them"
            )
        for stage, own, new in zip(self.stages, state.stages, params, strict=True):
            if found := difference(own.params, new):
                raise ValueError(f"params: those of {stage.layers} differ: {found}")
        made = []
        for stage, own, new in zip(self.stages, state.stages, params, strict=True):
            if stage.here:
                copied = put(jax.tree.map(np.array, jax.device_get(new)), stage.replicated)
                anew = jax.jit(stage.optimizer.restarted, out_shardings=stage.shared(own.opt_state))
                opt_state = anew(copied, own.params, own.opt_state)
                own = own._replace(params=copied, opt_state=opt_state)
            made.append(own)
        return state._replace(stages=tuple(made))
