"""Removal of old checkpoints."""

from __future__ import annotations

import pathlib
from collections.abc import Set

from fdg_jax.checkpoint import array_store, manifest


def tidy(directory: pathlib.Path, keep: int, damaged: Set[int], mark: str) -> None:
    """Removes older checkpoints and the remains of interrupted saves.

    Args:
      directory: the run's directory.
      keep: number of newest checkpoints to keep, in addition to the one with the lowest score.
      damaged: steps that are neither counted nor removed.
      mark: suffix of this run's unfinished checkpoints, which are not removed; "": none.

    Raises:
      OSError: something cannot be removed.
    """
    for left in directory.glob(".step-*"):
        if not (mark and left.name.endswith(mark)):
            array_store.remove(left)
    good = [step for step in manifest.steps(directory) if step not in damaged]
    scores = {step: manifest.score(manifest.folder(directory, step)) for step in good}
    best = min(good, key=lambda step: (scores[step], -step), default=None)
    for step in good[keep:]:
        if step != best:
            array_store.remove(manifest.folder(directory, step))
