"""Detection of non-finite values and failed programs inside a stage.

A guarded stage keeps a small record on its devices, an int32 array passed through every one of its
programs. The record is also the token that tells the host that a program has ended, so reading it
causes no additional wait.

    record = [skipped, first forward, first backward, pending]

    skipped          number of micro-batches without an update
    first forward    first micro-batch with a non-finite output, loss or new model state, or -1
    first backward   first micro-batch with a non-finite gradient or update, or -1
    pending          number of micro-batches left out of the current accumulation
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.engine.placement import gather
from fdg_jax.typing import PyTree

# None: the stage is not guarded.
Record = jax.Array | None

ON_NONFINITE = ("ignore", "stop", "skip")
SKIPPED, FORWARD, BACKWARD, PENDING = range(4)


def fresh() -> np.ndarray:
    """A record without failures."""
    return np.array([0, -1, -1, 0], np.int32)


def finite(*trees: PyTree) -> jax.Array:
    """Whether all values in the trees are finite; a boolean scalar, inside jit."""
    leaves = [v for v in jax.tree.leaves(trees) if jnp.issubdtype(v.dtype, jnp.inexact)]
    found = [jnp.all(jnp.isfinite(v)) for v in leaves]
    return jnp.stack(found).all() if found else jnp.bool_(True)


def choose(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` if ok, else ``old``."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def note(record: jax.Array, place: int, ok: jax.Array, number: jax.Array) -> jax.Array:
    """The record with ``number`` at ``place``, FORWARD or BACKWARD, if it is the first not ok."""
    first = ~ok & (record[place] < 0)
    return record.at[place].set(jnp.where(first, number, record[place]))


def leave_out(record: jax.Array, ok: jax.Array, number: jax.Array, place: int) -> jax.Array:
    """The record after a backward: counts a skip at ``place`` unless ok."""
    return note(record, BACKWARD, ok, number).at[place].add((~ok).astype(record.dtype))


def computed(outputs: PyTree, inputs: PyTree, learnt: Sequence[bool]) -> list[jax.Array]:
    """Arrays that are finite unless a traced function produced non-finite values.

    A mask with -inf that is passed from layer to layer, cast, or made from lengths is no failure:
    in outputs independent of weights only NaN counts, and only if the inputs have none.

    Args:
      outputs: the function's outputs.
      inputs: its inputs except weights.
      learnt: which leaves of the outputs depend on weights.

    Returns:
      The arrays, to be checked with `finite`.
    """
    given = jax.tree.leaves(inputs)
    known, found = {id(leaf) for leaf in given}, []
    for leaf, own in zip(jax.tree.leaves(outputs), learnt, strict=True):
        if id(leaf) in known or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        found.append(leaf if own else jnp.where(_nan([leaf]) & ~_nan(given), jnp.nan, 0.0))
    return found


def _nan(leaves: Sequence[jax.Array]) -> jax.Array:
    found = [jnp.isnan(v).any() for v in leaves if jnp.issubdtype(v.dtype, jnp.inexact)]
    return jnp.stack(found).any() if found else jnp.bool_(False)


def changed(new: PyTree, old: PyTree) -> PyTree:
    """Maps unchanged elements to zero, keeping changed ones.

    A constant in the parameters or in a model state, such as -inf, is no failure.
    """

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return a
        same = (a == b) | (jnp.isnan(a) & jnp.isnan(b))
        return jnp.where(same, jnp.zeros_like(a), a)

    return jax.tree.map(one, new, old)


def skipped(records: Sequence[Record]) -> list[int]:
    """The number of micro-batches that each stage skipped; every process must call it and waits.

    Args:
      records: the stages' records; None if not checked.
    """
    found = []
    for record in records:
        if record is None:
            return [0 for _ in records]
        elsewhere = isinstance(record, jax.Array) and not record.addressable_shards
        found.append(0 if elsewhere else int(jax.device_get(record)[SKIPPED]))
    return [int(n) for n in gather(np.array(found, np.int32)).max(axis=0)]
