"""What passes between stages, and what a pipeline says of its programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from fdg_jax.engine.placement import put
from fdg_jax.engine.stage import Stage
from fdg_jax.errors import ConsumedStateError, StageError
from fdg_jax.schedule import Action
from fdg_jax.typing import PyTree


class Metrics(NamedTuple):
    """What is known of one mini-batch when it has reached a loss.

    Attributes:
      batch: its number.
      loss: a scalar, perhaps not computed yet.
      aux: the dictionary that the loss function returned.
      stage: whose loss it is; the last one's unless stages have losses of their own.
    """

    batch: int
    loss: jax.Array
    aux: dict[str, Any]
    stage: int


class Done(NamedTuple):
    """A program that was dispatched.

    Attributes:
      stage: whose.
      what: its actions, as in a schedule's grid.
      batch: the mini-batch that it worked on.
      token: a small output, never donated: there when the program has ended; the stage's record
        where it keeps one.
    """

    stage: int
    what: str
    batch: int
    token: jax.Array


class Watch(Protocol):
    """An observer of what is dispatched, while it is; must not wait for a device."""

    def entered(self, batch: int, inputs: PyTree) -> None:
        """A mini-batch enters; ``inputs`` are on the first stage's devices, never donated."""

    def dispatched(self, actions: Sequence[Action], since: float, token: jax.Array) -> None:
        """A program, of actions of one stage, whose dispatch began at ``time.perf_counter()``."""


def send(tree: PyTree, stage: Stage, name: str = "inputs", microbatches: int = 1) -> PyTree:
    """A message onto a stage's devices; numpy arrays are copied, CPU devices would alias them."""
    leaves, structure = jax.tree.flatten(tree)
    places = jax.tree.leaves(stage.places(tree))
    pairs = zip(leaves, places, strict=True)
    if microbatches == 1 and all(isinstance(v, jax.Array) and v.sharding == p for v, p in pairs):
        return tree  # made there, by a stage that shares the devices
    leaves = [leaf if isinstance(leaf, jax.Array) else np.array(leaf) for leaf in leaves]
    checked = stage.mesh.size > 1 or microbatches > 1
    for leaf, place in zip(leaves, places, strict=True) if checked else ():
        if place != stage.sharded:
            continue  # the scales of an encoded message
        if leaf.ndim and leaf.shape[0] % microbatches:
            raise ValueError(
                f"{name}: a batch of {leaf.shape[0]} does not divide into {microbatches} "
                "micro-batches; take a multiple"
            )
        if leaf.ndim and leaf.shape[0] // microbatches % stage.mesh.size:
            raise ValueError(
                f"{name}: a batch of {leaf.shape[0] // microbatches} does not divide over the "
                f"{stage.mesh.size} devices of a stage; take a multiple"
            )
    return jax.tree.unflatten(structure, put(leaves, places))


def failure(
    programs: Sequence[Stage], k: int, what: str, batch: int, error: Exception
) -> Exception:
    """An error that names where it came from."""
    if "has been deleted" in str(error):
        return ConsumedStateError()
    return StageError(
        f"stage {k} ({programs[k].layers}), mini-batch {batch}, {what}: "
        f"{type(error).__name__}: {error}",
        k,
        batch,
    )
