"""What a state of a pipeline holds: weights, model state, outputs, counts."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from fdg_jax.active_mesh import no_active_mesh
from fdg_jax.engine import nonfinite
from fdg_jax.engine.batch_axes import undivided
from fdg_jax.engine.evaluate import evaluate
from fdg_jax.engine.placement import put
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState
from fdg_jax.engine.state_check import READ, check_state
from fdg_jax.layer import Layer
from fdg_jax.partition.layerwise import difference
from fdg_jax.typing import PyTree


class Views:
    """The part of `fdg_jax.Pipeline` that reads states, and replaces their weights.

    Attributes:
      stages: its stages, input first.
      num_stages: K.
      network: all of it as one layer, whose params and state are ``tuple(pipe.true_params(state))``
        and ``tuple(pipe.model_state(state))``, brought to one device.
    """

    stages: list[Stage]
    num_stages: int
    network: Layer

    @no_active_mesh()
    def predict(
        self, state: PipelineState, x: PyTree, params: Sequence[PyTree] | None = None
    ) -> PyTree:
        """Outputs in evaluation mode, through the stages where they are.

        Args:
          state: any state; it is not consumed.
          x: inputs, batch axis first.
          params: weights, one pytree per stage, on its devices, such as `averaged_params` returns.
            None: the true ones.

        Returns:
          The network's outputs, on the last stage's devices, perhaps not computed yet.

        Raises:
          ValueError: the batch does not fit, or does not divide over a stage's devices.
          ConsumedStateError: the state was used before.
        """
        check_state(state, self.num_stages, READ)
        x = undivided(x, self.stages[0].mesh.size)
        return evaluate(self.stages, state.stages, x, params)

    def params(self, state: PipelineState) -> list[PyTree]:
        """The parameters of each stage, where they are, as its next forward uses them.

        Args:
          state: any state; it is not consumed.

        Returns:
          K pytrees, valid until the next step; predictions of the weights where the optimizer
          makes them such (`fdg_jax.predict_weights`). A tied array is in its owner's stage alone.
        """
        check_state(state, self.num_stages, ("params",))
        return [stage.params for stage in state.stages]

    @no_active_mesh()
    def true_params(self, state: PipelineState) -> list[PyTree]:
        """The weights of each stage, to evaluate and to keep: `params` without prediction.

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
        """The average of the weights that `fdg_jax.average_weights` keeps.

        Args:
          state: any state; it is not consumed.

        Returns:
          K pytrees, on the stages' devices, valid until the next step.

        Raises:
          ValueError: the optimizer keeps no average.
        """
        check_state(state, self.num_stages, READ)
        pairs = zip(self.stages, state.stages, strict=True)
        return [stage.averaged_params(own.params, own.opt_state)[0] for stage, own in pairs]

    def skipped(self, state: PipelineState) -> list[int]:
        """How many micro-batches each stage skipped, since they were not finite.

        Args:
          state: any state; this waits for it, and every process calls it.

        Returns:
          K counts; zeros where it was not checked.
        """
        return nonfinite.skipped([own.record for own in state.stages])

    left_out = skipped  # the name of earlier versions

    def model_state(self, state: PipelineState) -> list[PyTree]:
        """The model state of each stage, such as batch statistics, where it is.

        Args:
          state: any state; it is not consumed.

        Returns:
          K pytrees, valid until the next step.
        """
        check_state(state, self.num_stages, ("model_state",))
        return [stage.model_state for stage in state.stages]

    @no_active_mesh()
    def replace_params(self, state: PipelineState, params: Sequence[PyTree]) -> PipelineState:
        """A state with other weights, such as those of a trained model; all else stays.

        Optimizers go on with their moments and counts; predictions and averages of weights begin
        anew.

        Args:
          state: with nothing in flight, as `init` and `drain` return it; consumed.
          params: true weights, one pytree per stage, as `true_params` returns them: arrays of JAX
            or numpy, which are copied.

        Returns:
          The new state.

        Raises:
          ValueError: mini-batches are in flight; or structure, shapes or dtypes are others. The
            state is whole then.
          ConsumedStateError: the state was used before.

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
