"""Synthesizers: predict the cotangent of a stage's output, and their training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.engine.residuals import split_inexact
from fdg_jax.layer import Layer, batch_key, output_of, zeros_like
from fdg_jax.typing import Key, PyTree

# Folded into the key, so that a synthesizer's keys differ from those of the layers.
_SYNTHESIZER = 0x73796E74


class SynthesizerState(NamedTuple):
    """The state of a synthesizer, on its stage's devices."""

    params: PyTree
    model_state: PyTree
    opt_state: optax.OptState


class Output(NamedTuple):
    """The input of a synthesizer: a stage's output.

    Attributes:
      output: the output of the forward of one micro-batch.
      labels: its labels; None in a pipeline initialised without example labels.
      number: number of the forward, which seeds its noise.
    """

    output: PyTree
    labels: PyTree
    number: jax.Array


@dataclass(frozen=True)
class Synthesizer:
    """A layer that predicts the cotangent of a stage's output, and its optimizer.

    .. math::
        \\hat\\delta = S(h, \\text{labels}), \\qquad
        \\min_S \\tfrac{1}{|h|} \\lVert S(h, \\text{labels}) - \\delta \\rVert^2

    Args:
      layer: S, such as `fdg_jax.models.synthesizer`: maps a pair of output and labels to a pytree
        with the output's structure, shapes and dtypes.
      optimizer: the optimizer of its parameters, such as ``optax.adam(1e-4)``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from fdg_jax import from_fn
      >>> half = Synthesizer(from_fn(lambda pair: pair[0] / 2), optax.adam(1e-4))
      >>> own = Output(jnp.ones(3), None, jnp.int32(0))
      >>> half.predict((), (), own, jax.random.key(0))[0][0].tolist()
      [0.5, 0.5, 0.5]

    References:
      Jaderberg et al., `Decoupled Neural Interfaces using Synthetic Gradients
      <https://arxiv.org/abs/1608.05343>`_, section 2.1, 2017.
    """

    layer: Layer
    optimizer: optax.GradientTransformation

    def init(self, key: Key, own: Output) -> SynthesizerState:
        """Initialises the parameters.

        Args:
          key: the root key.
          own: an example output.

        Returns:
          The state.

        Raises:
          ValueError: the layer's prediction and the output differ in shapes.
        """
        example = zeros_like((own.output, own.labels))
        params, state = self.layer.init(jax.random.fold_in(key, _SYNTHESIZER), example)
        made = output_of(self.layer, params, state, example)
        if (there := _shapes(made)) != (here := _shapes(example[0])):
            raise ValueError(
                f"synthesizers: one predicts {there} for an output of {here}; it must keep "
                "structure, shapes and dtypes"
            )
        return SynthesizerState(params, state, self.optimizer.init(params))

    def predict(
        self, params: PyTree, state: PyTree, own: Output, key: Key
    ) -> tuple[list[jax.Array], PyTree]:
        """The predicted cotangent.

        Args:
          params, state: the layer's params and state.
          own: the output.
          key: the root key.

        Returns:
          The cotangents of the output's floating-point leaves, and the layer's new state.
        """
        noise = jax.random.fold_in(batch_key(key, own.number), _SYNTHESIZER)
        pair = own.output, own.labels
        made, state = self.layer.apply(params, state, pair, train=True, key=noise)
        return split_inexact(made)[0], state

    def teach(
        self, state: SynthesizerState, own: Output, cotangent: list[jax.Array], key: Key
    ) -> SynthesizerState:
        """One update towards a target cotangent.

        Args:
          state: the current state.
          own: the output.
          cotangent: the target, for the output's floating-point leaves.
          key: the root key.

        Returns:
          The new state.
        """

        def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
            made, left = self.predict(params, state.model_state, own, key)
            size = sum(leaf.size for leaf in cotangent)
            squares = [jnp.sum((a - b) ** 2) for a, b in zip(made, cotangent, strict=True)]
            return jnp.asarray(sum(squares) / size), left

        gradient, left = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        return SynthesizerState(optax.apply_updates(state.params, updates), left, opt_state)


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)
