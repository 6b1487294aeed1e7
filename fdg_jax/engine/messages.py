"""Messages between stages, and the metrics and events that a pipeline reports."""

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
    """The loss and metrics of one mini-batch.

    ``metrics["error"]`` is ``metrics.aux["error"]``; "batch", "loss" and "stage" are valid names as
    well.

    Attributes:
      batch: the number of the mini-batch.
      loss: a scalar, computed asynchronously.
      aux: the dictionary returned by the loss function.
      stage: the stage of the loss; the last one unless several stages have a loss.
    """

    batch: int
    loss: jax.Array
    aux: dict[str, Any]
    stage: int

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return tuple.__getitem__(self, key)
        return getattr(self, key) if key in ("batch", "loss", "stage") else self.aux[key]


class MetricsList(list[Metrics]):
    """Metrics of mini-batches in order; indexing by name returns the last value.

    Example:
      >>> found = MetricsList([Metrics(3, np.float32(0.5), {"error": np.float32(0.25)}, 1)])
      >>> float(found["loss"]), float(found["error"]), found[0].batch, float(MetricsList()["loss"])
      (0.5, 0.25, 3, nan)
    """

    def __getitem__(self, key: Any) -> Any:
        """One or several entries, or a value of the last one; NaN if there is none."""
        if not isinstance(key, str):
            return super().__getitem__(key)
        return super().__getitem__(-1)[key] if self else np.float32(np.nan)


jax.tree_util.register_pytree_with_keys(
    MetricsList,
    lambda found: ([(jax.tree_util.SequenceKey(i), one) for i, one in enumerate(found)], None),
    lambda _, found: MetricsList(found),
)


class Done(NamedTuple):
    """A dispatched program.

    Attributes:
      stage: its stage.
      what: its actions, as in a schedule's grid.
      batch: its mini-batch.
      token: a small output, never donated, ready when the program has ended; the stage's record
        if it has one.
    """

    stage: int
    what: str
    batch: int
    token: jax.Array


class Watch(Protocol):
    """An observer of dispatched programs; must not wait for a device."""

    def entered(self, batch: int, inputs: PyTree) -> None:
        """Called when a mini-batch enters; ``inputs`` are on the first stage, never donated."""

    def dispatched(self, actions: Sequence[Action], since: float, token: jax.Array) -> None:
        """Called after a program was dispatched; ``since`` is `time.perf_counter` at its start."""


def send(tree: PyTree, stage: Stage) -> PyTree:
    """Sends a message to a stage's devices; copies numpy arrays, which CPU devices would alias."""
    leaves, structure = jax.tree.flatten(tree)
    places = jax.tree.leaves(stage.places(tree))
    pairs = zip(leaves, places, strict=True)
    if all(isinstance(v, jax.Array) and v.sharding == p for v, p in pairs):
        return tree  # already there, from a stage on the same devices
    leaves = [leaf if isinstance(leaf, jax.Array) else np.array(leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, put(leaves, places))


def failure(
    programs: Sequence[Stage], k: int, what: str, batch: int, error: Exception
) -> Exception:
    """An error that names the stage, layers and mini-batch."""
    if "has been deleted" in str(error):
        return ConsumedStateError()
    where = f"stage {k} ({programs[k].layers})"
    if what == "tick":
        where = f"stages 0 to {len(programs) - 1}, which are one program"
    return StageError(
        f"{where}, mini-batch {batch}, {what}: {type(error).__name__}: {error}",
        k,
        batch,
    )
