"""The gradient rule of PETRA: a stage recomputes its input from its output.

    forward     x ──► layer ──► y           stored: the input of layers without an inverse
    backward    (y~, cotangent) ──► (x~, cotangent of x), gradient, all at the newest weights

A stage is processed in runs of layers: layers with an inverse reconstruct their inputs one by one,
other layers are recomputed from the stored input of their run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from fdg_jax.engine.gradient_rule import GradientRule, Stage
from fdg_jax.engine.residuals import Stash, split_inexact
from fdg_jax.layer import Chain, Layer, batch_key
from fdg_jax.typing import Key, PyTree


class Run(NamedTuple):
    """Adjacent layers of a stage that either all have an inverse or all have none.

    Attributes:
      layers: with their numbers in the network.
      first: position of its first layer in the stage.
      inverts: whether they have an inverse.
    """

    layers: tuple[Layer, ...]
    first: int
    inverts: bool


def runs(layer: Layer) -> list[Run]:
    """The runs of a stage, input first.

    Args:
      layer: the stage; a chain is divided, any other layer is a run.

    Returns:
      Runs.

    Example:
      >>> import jax.numpy as jnp
      >>> from fdg_jax import chain, coupling, from_fn
      >>> sin, block = from_fn(jnp.sin), coupling(from_fn(jnp.sin))
      >>> [(len(run.layers), run.inverts) for run in runs(chain([sin, sin, block]))]
      [(2, False), (1, True)]
    """
    found: list[Run] = []
    for i, one in enumerate(layer.numbered if isinstance(layer, Chain) else [layer]):
        inverts = one.inverse is not None
        if found and found[-1].inverts == inverts:
            found[-1] = found[-1]._replace(layers=(*found[-1].layers, one))
        else:
            found.append(Run((one,), i, inverts))
    return found


def kept_by(layer: Layer, params: PyTree, state: PyTree, x: PyTree) -> list[PyTree]:
    """The data that a stage stores per mini-batch in flight; computes nothing.

    Args:
      layer: the stage.
      params, state: its params and model state, which may be abstract.
      x: its input, which may be abstract.

    Returns:
      Shapes and dtypes of the input of each run of layers without an inverse.
    """

    def kept(params: PyTree, state: PyTree, x: PyTree) -> PyTree:
        return REVERSIBLE.apply(layer, params, state, x, jax.random.key(0))[2]

    found: list[PyTree] = jax.eval_shape(kept, params, state, x)
    return found


@dataclass(frozen=True)
class Reversible(GradientRule):
    """Reconstructs inputs from outputs; stores nothing for reversible layers.

    .. math::
        \\tilde x = F^{-1}(\\tilde y, w_t), \\qquad
        (\\delta_x, g) = \\mathrm{vjp}_{F(\\cdot, w_t)}(\\tilde x)(\\delta_y)

    with the newest weights; the message to the previous stage is the pair of :math:`\\tilde x` and
    :math:`\\delta_x`. Layers without an inverse store their input and are recomputed. A stage with
    a loss runs backward right after forward: it stores what "stale" stores and sends its true
    input.

    References:
      Rivaud et al., `PETRA: Parallel End-to-end Training with Reversible Architectures
      <https://arxiv.org/abs/2406.02052>`_, section 3, 2024.
    """

    name: str = "reversible"
    keeps_residuals: bool = False
    keeps_weights: bool = False
    reconstructs: bool = True

    def of_stage(self, has_loss: bool, staleness: int = 0) -> GradientRule:
        del staleness
        return _WITH_LOSS if has_loss else self

    def apply(
        self, layer: Layer, params: PyTree, state: PyTree, x: PyTree, key: Key
    ) -> tuple[PyTree, PyTree, PyTree]:
        kept, new_state = [], []
        params, state = _each(layer, params), _each(layer, state)
        for run in runs(layer):
            if not run.inverts:
                kept.append(x)
            for one, p, s in _numbered(run, params, state):
                x, left = one.apply(p, s, x, train=True, key=key)
                new_state.append(left)
        return x, tuple(new_state) if isinstance(layer, Chain) else new_state[0], kept

    def message(self, inputs: PyTree, cotangent: PyTree) -> PyTree:
        return inputs, cotangent

    def cotangent(self, message: PyTree) -> PyTree:
        return message[1]

    def backward(
        self, stage: Stage, params: PyTree, stash: Stash, key: Key, message: PyTree
    ) -> tuple[PyTree, PyTree]:
        y, cotangent = message
        kept, noise = list(stash.inputs), batch_key(key, stash.number)
        each, state = _each(stage.layer, params), _each(stage.layer, stash.model_state)
        gradients: list[PyTree] = []
        for run in reversed(runs(stage.layer)):
            if run.inverts:
                for one, p, s in reversed(list(_numbered(run, each, state))):
                    assert one.reverse is not None
                    above = jax.tree.unflatten(jax.tree.structure(y), cotangent)
                    y, gradient, below = one.reverse(p, s, y, above, key=noise)
                    cotangent = jax.tree.leaves(below)
                    gradients.append(gradient)
            else:
                y = kept.pop()
                own, cotangent = _recompute(run, each, state, y, cotangent, noise)
                gradients += reversed(own)
        whole = tuple(reversed(gradients))
        gradient = whole if isinstance(stage.layer, Chain) else whole[0]
        return gradient, self.message(y, cotangent) if stage.sends else None


@dataclass(frozen=True)
class _WithLoss(GradientRule):
    """For a stage with a loss: "stale", with PETRA's message."""

    name: str = "reversible"
    reconstructs: bool = True

    def message(self, inputs: PyTree, cotangent: PyTree) -> PyTree:
        return inputs, cotangent

    def cotangent(self, message: PyTree) -> PyTree:
        return message[1]


_WITH_LOSS = _WithLoss()
REVERSIBLE = Reversible()


def _each(layer: Layer, tree: PyTree) -> Sequence[PyTree]:
    """Params or state of every layer of a stage."""
    return tree if isinstance(layer, Chain) else (tree,)


def _numbered(
    run: Run, params: Sequence[PyTree], state: Sequence[PyTree]
) -> Iterator[tuple[Layer, PyTree, PyTree]]:
    for i, layer in enumerate(run.layers, start=run.first):
        yield layer, params[i], state[i]


def _recompute(
    run: Run,
    params: Sequence[PyTree],
    state: Sequence[PyTree],
    x: PyTree,
    cotangent: list[jax.Array],
    key: Key,
) -> tuple[list[PyTree], list[jax.Array]]:
    """Gradients of a run's layers and the cotangent of its input, from that input."""
    moving, join = split_inexact(x)
    end = run.first + len(run.layers)

    def outputs(own: Sequence[PyTree], moving: list[jax.Array]) -> list[jax.Array]:
        y = join(moving)
        for one, p, s in zip(run.layers, own, state[run.first : end], strict=True):
            y, _ = one.apply(p, s, y, train=True, key=key)
        return split_inexact(y)[0]

    _, vjp = jax.vjp(outputs, list(params[run.first : end]), moving)
    gradients, below = vjp(cotangent)
    return gradients, below
