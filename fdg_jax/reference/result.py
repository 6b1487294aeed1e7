"""What a reference run gives, and what every one of them needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdg_jax.typing import PyTree


class Result(NamedTuple):
    """What a reference run gives.

    Attributes:
      params: final parameters, one pytree per stage.
      model_state: final model state, one pytree per stage.
      losses: one per batch, in order.
    """

    params: list[PyTree]
    model_state: list[PyTree]
    losses: list[jax.Array]


def part_of(batch: tuple[PyTree, PyTree], micro: int, count: int) -> tuple[PyTree, PyTree]:
    """One of the micro-batches of a mini-batch; a leaf without a batch axis goes to each."""

    def one(v: Any) -> Any:
        size = len(v) // count if jnp.ndim(v) else 0
        return v[micro * size : (micro + 1) * size] if jnp.ndim(v) else v

    return jax.tree.map(one, batch)
