"""The arrays of one stage in a checkpoint that several processes write, each what it has.

Orbax saves what all processes bring to it together, in a collective, and a thread that writes in
the background must not begin one. So each stage is a file of NumPy's, put there by the process
that has the stage's first device; the file appears when it is whole.
"""

from __future__ import annotations

import os
import pathlib
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np

# A process that has not written its part by then will not.
SECONDS = 600.0
_FAILED = "failed"


def path(folder: pathlib.Path, k: int) -> pathlib.Path:
    """The file of stage k."""
    return folder / f"stage_{k}.npz"


def write(folder: pathlib.Path, k: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a stage's file, on disk when this returns.

    Args:
      folder: it is made if it is not there.
      k: the stage.
      arrays: by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = path(folder, k)
    partial = folder / f".{final.name}"
    with partial.open("wb") as file:
        # As bytes, numbered by name: the manifest has dtypes, some of which NumPy does not know.
        whole = (np.ascontiguousarray(v).reshape(-1) for _, v in sorted(arrays.items()))
        np.savez(file, *(v.view(np.uint8) for v in whole))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(final)


def read(
    folder: pathlib.Path, k: int, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """A stage's arrays.

    Args:
      folder: the one given to `write`.
      k: the stage.
      shapes: and dtypes by name.

    Returns:
      The arrays by name.
    """
    with np.load(path(folder, k), allow_pickle=False) as file:
        return {
            name: file[f"arr_{i}"].view(like.dtype).reshape(like.shape)
            for i, (name, like) in enumerate(sorted(shapes.items()))
        }


def fail(folder: pathlib.Path) -> None:
    """Lets the process that waits for this one's files know that they will not come."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FAILED).touch()


def wait(folder: pathlib.Path, stages: int, abandoned: threading.Event) -> None:
    """Returns when the files of all stages are there.

    Args:
      folder: the one given to `write`.
      stages: K.
      abandoned: ends the wait when it is set.

    Raises:
      RuntimeError: one will not come.
    """
    end = time.monotonic() + SECONDS
    while missing := [k for k in range(stages) if not path(folder, k).exists()]:
        if (folder / _FAILED).exists():
            raise RuntimeError("another process could not write its part")
        if abandoned.wait(0.05) or time.monotonic() > end:
            raise RuntimeError(f"the part of stage {missing[0]} did not come")
