"""Stages with their own head, for schedules with a loss in every stage."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from fdg_jax.layer import Layer, output_of, zeros_like
from fdg_jax.typing import Key, PyTree

# Folded into the key, so that a head's keys differ from those of the layers.
_HEAD = 0x68656164


@dataclass(frozen=True)
class Headed(Layer):
    """A layer with a head that feeds a loss; made by `with_head`."""

    body: Layer | None = None
    head: Layer | None = None

    @property
    def size(self) -> int:
        assert self.body is not None
        return self.body.size

    def at(self, index: int | jax.Array) -> Layer:
        assert self.body is not None
        assert self.head is not None
        return with_head(self.body.at(index), self.head.at(index + self.size))

    def scores(
        self, params: PyTree, state: PyTree, y: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        assert self.head is not None
        folded = None if key is None else jax.random.fold_in(key, _HEAD)
        made, own = self.head.apply(params[1], state[1], y, train=train, key=folded)
        return made, (state[0], own)


def with_head(body: Layer, head: Layer) -> Layer:
    """A stage whose loss is computed from the output of an auxiliary head.

    .. math::
        h_k = f_k(h_{k-1}), \\qquad L_k = \\ell(a_k(h_k), \\text{labels})

    The next stage gets h, the stage's loss function gets a(h). One optimizer trains both.

    Args:
      body: f, a stage of `fdg_jax.partition`.
      head: a, such as `fdg_jax.models.auxiliary_head`. It is not a layer of the network: it has no
        number, and `Pipeline.predict` and exports omit it.

    Returns:
      A layer whose params and state are pairs for body and head.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fdg_jax import from_fn
      >>> stage = with_head(from_fn(jnp.sin), from_fn(jnp.sum))
      >>> params, state = stage.init(jax.random.key(0), jnp.zeros((2, 3)))
      >>> y, state = stage.apply(params, state, jnp.zeros((2, 3)), train=True, key=None)
      >>> score, state = stage.scores(params, state, y, train=True, key=None)
      >>> y.shape, score.shape
      ((2, 3), ())

    References:
      Belilovsky, Eickenberg, Oyallon: `Decoupled Greedy Learning of CNNs
      <https://arxiv.org/abs/1901.08164>`_, section 3, 2020.
    """

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        params, state = body.init(key, x)
        y = zeros_like(output_of(body, params, state, x))
        own, head_state = head.init(jax.random.fold_in(key, _HEAD), y)
        return (params, own), (state, head_state)

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        y, new = body.apply(params[0], state[0], x, train=train, key=key)
        return y, (new, state[1])

    return Headed(init, apply, body=body, head=head)
