"""Removal of old checkpoints."""

from __future__ import annotations

import pathlib
from collections.abc import Set

from fdg_jax.checkpoint import array_store, manifest


def tidy(directory: pathlib.Path, keep: int, damaged: Set[int], mark: str) -> None:
    """Removes older checkpoints and the remains of interrupted saves.

    Args:
      directory: of the run.
      keep: how many of the newest stay, beside the one with the lowest score.
      damaged: steps that count as if they were not there, and stay.
      mark: how the names of this run's unfinished checkpoints end; "": there are none.

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
