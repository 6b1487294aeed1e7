"""The arrays of one stage in a checkpoint that several processes write, each what it has.

Orbax saves what all processes bring to it together, in a collective, and a thread that writes in
the background must not begin one. So the process that has the stage's first device writes them
itself, in the store and the format that Orbax keeps them in; they appear when they are whole.
"""

from __future__ import annotations

import pathlib
import shutil
import threading
import time
from collections.abc import Mapping

import numpy as np
import tensorstore as ts

from fdg_jax.checkpoint import restore

# A process that has not written its part by then will not.
SECONDS = 600.0
_FAILED = "failed"


def write(folder: pathlib.Path, k: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a stage's entry, on disk when this returns.

    Args:
      folder: of the entries; it is made if it is not there.
      k: the stage.
      arrays: by name.
    """
    partial = folder / f".{restore.entry(k)}"
    partial.mkdir(parents=True, exist_ok=True)
    with ts.Transaction() as transaction:
        for name, array in arrays.items():
            store = ts.open(
                restore.spec(partial, name),
                create=True,
                dtype=ts.dtype(str(array.dtype)),
                shape=array.shape,
                chunk_layout=ts.ChunkLayout(chunk_shape=array.shape),
                transaction=transaction,
            ).result()
            store.write(array).result()
    partial.rename(folder / restore.entry(k))


def fail(folder: pathlib.Path) -> None:
    """Lets the process that waits for this one's entries know that they will not come."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FAILED).touch()


def wait(folder: pathlib.Path, stages: int, abandoned: threading.Event) -> None:
    """Returns when the entries of all stages are there.

    Args:
      folder: the one given to `write`.
      stages: K.
      abandoned: ends the wait when it is set.

    Raises:
      RuntimeError: one will not come; what is there is removed.
    """
    end = time.monotonic() + SECONDS
    reason = ""
    while missing := [k for k in range(stages) if not (folder / restore.entry(k)).exists()]:
        if (folder / _FAILED).exists():
            reason = "another process could not write its part"
        elif abandoned.wait(0.05) or time.monotonic() > end:
            reason = f"the part of stage {missing[0]} did not come"
        if reason:
            shutil.rmtree(folder.parent, ignore_errors=True)
            raise RuntimeError(reason)
