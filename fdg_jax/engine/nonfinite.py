"""Detection of non-finite values and failed programs inside a stage.

A guarded stage keeps a small record on its own devices, an int32 array that every one of its
programs takes and returns. The record is also the token by which the host sees that a program has
ended, so looking at it costs no wait.

    record = [skipped, first forward, first backward, pending]

    skipped          micro-batches that the stage did not learn from
    first forward    the first whose output or new model state was not finite, or -1
    first backward   the first whose loss, gradient or update was not finite, or -1
    pending          those left out of the accumulation under way
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.engine.placement import gather
from fdg_jax.typing import PyTree

# None: a stage that is not guarded.
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
    """What tells whether the outputs of a function, while it is traced, have failed.

    A mask with -inf that goes from layer to layer, is cast on the way, or is made from lengths is
    no failure: of what no weight has a part in, only NaN counts that the function made.

    Args:
      outputs: of the function.
      inputs: those of its inputs that are no weights.
      learnt: which leaves of the outputs depend on weights.

    Returns:
      Arrays; if they are finite, the function has not failed.
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
      records: of the stages; None where it was not checked.
    """
    found = []
    for record in records:
        if record is None:
            return [0 for _ in records]
        elsewhere = isinstance(record, jax.Array) and not record.addressable_shards
        found.append(0 if elsewhere else int(jax.device_get(record)[SKIPPED]))
    return [int(n) for n in gather(np.array(found, np.int32)).max(axis=0)]
