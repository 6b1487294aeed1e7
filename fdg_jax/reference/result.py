"""The result of a reference run, and shared helpers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdg_jax.shared import is_shared, plain
from fdg_jax.typing import PyTree


class Result(NamedTuple):
    """The result of a reference run.

    Attributes:
      params: final parameters, one pytree per stage.
      model_state: final model state, one pytree per stage.
      losses: one per batch, in order.
    """

    params: list[PyTree]
    model_state: list[PyTree]
    losses: list[jax.Array]


def total_of(found: tuple[Any, Any], parts: int) -> tuple[jax.Array, Any]:
    """The differentiated value of one part of a mini-batch, and its weight or None.

    For an undivided mini-batch the value is the loss, sum / weight.
    """
    loss = found[0]
    if not isinstance(loss, tuple | list):
        return loss, None
    total, weight = loss[0], jax.lax.stop_gradient(loss[1])
    if parts > 1:
        return total, weight
    return total / jnp.where(weight == 0, 1, weight), None


def reduced(values: list[tuple[PyTree, Any]], mean: bool = True) -> PyTree:
    """The mean or sum of gradients or losses; with weights, the total sum by the total weight."""
    count = len(values)
    scale: Any = count
    if values[0][1] is not None:
        weight = sum(weight for _, weight in values)
        scale = jnp.where(weight == 0, 1, weight)
    scale = scale if mean else scale / count
    return jax.tree.map(lambda *v: sum(v) / scale, *[value for value, _ in values])


def part_of(batch: tuple[PyTree, PyTree], micro: int, count: int) -> tuple[PyTree, PyTree]:
    """One micro-batch of a mini-batch; shared arrays go to each."""

    def one(v: Any) -> Any:
        if is_shared(v):
            return plain(v)
        size = len(v) // count if jnp.ndim(v) else 0
        return v[micro * size : (micro + 1) * size] if jnp.ndim(v) else v

    return jax.tree.map(one, batch, is_leaf=is_shared)
