"""The arrays of a stage on disk: one zarr3 array each, in one OCDBT store per stage.

The process with a stage's first device writes the stage's store, which gets its name when complete.
Reading compares dtypes and shapes before allocating memory.
"""

from __future__ import annotations

import errno
import math
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from fdg_jax.checkpoint import manifest
from fdg_jax.engine.placement import absent, put

# After this time a process's part is considered failed.
SECONDS = 600.0
_FAILED = "failed"


def check(dtypes: Iterable[Any]) -> None:
    """Rejects arrays that could not be restored.

    Args:
      dtypes: dtypes of the arrays to be written.

    Raises:
      ValueError: the store does not support a dtype.
    """
    for dtype in dtypes:
        try:
            ts.open(_open_spec(str(dtype)), create=True).result()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"state: an array of dtype {dtype} cannot be stored; keep it in another dtype"
            ) from error


def _open_spec(dtype: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "memory"},
        "schema": {"dtype": ts.dtype(dtype).name, "domain": {"shape": [1]}},
    }


def check_room(folder: pathlib.Path, sizes: Sequence[int]) -> None:
    """Rejects a save that exceeds the free disk space.

    Args:
      folder: a folder on the disk.
      sizes: sizes of the arrays, in bytes.

    Raises:
      OSError: there is not enough free space.
    """
    free = shutil.disk_usage(folder).free
    # Each array also needs space for its JSON metadata and index entries.
    if free < (needed := sum(sizes) + 2048 * len(sizes)):
        text = f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes are needed, {free:,} are free"
        raise OSError(errno.ENOSPC, text)


def write(folder: pathlib.Path, k: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays of a stage and returns when they are on disk.

    Args:
      folder: the folder of the stores; created if missing.
      k: the stage.
      arrays: by name; empty arrays are not stored.
    """
    partial = folder / f".{entry(k)}"
    partial.mkdir(parents=True, exist_ok=True)
    # With one context the store is one database, whose index is written once.
    context = ts.Context({})
    with ts.Transaction() as transaction:
        writing = []
        for name, array in arrays.items():
            if not array.size:
                continue
            store = ts.open(
                spec(partial, name),
                create=True,
                context=context,
                dtype=ts.dtype(str(array.dtype)),
                shape=array.shape,
                chunk_layout=ts.ChunkLayout(chunk_shape=array.shape),
                transaction=transaction,
            ).result()
            writing.append(store.write(array))
        for future in writing:
            future.result()
    partial.rename(folder / entry(k))


def read(folder: pathlib.Path, k: int, expected: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
    """Reads the arrays of one stage.

    Args:
      folder: the folder of the stores.
      k: the stage.
      expected: shape, dtype and sharding of each array, by name.

    Returns:
      Arrays by name.

    Raises:
      Damaged: an array is missing, unreadable, or of another dtype or shape.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 26}})
    opened, found = {}, {}
    try:
        for name, like in expected.items():
            if like.size:
                opened[name] = ts.open(
                    spec(folder / entry(k), name),
                    read=True,
                    open=True,
                    context=context,
                    dtype=ts.dtype(str(like.dtype)),
                    shape=like.shape,
                )
        for name, future in opened.items():
            store = future.result()
            # Chunks are decoded as a whole, so they must not be larger than the array.
            piece = store.chunk_layout.write_chunk.shape or ()
            if math.prod(n or 0 for n in piece) > expected[name].size:
                raise ValueError(f"{name} is stored in pieces larger than itself")
            found[name] = store.read()
        values = {name: future.result() for name, future in found.items()}
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        reason = str(error).partition(" [tensorstore_spec=")[0]
        raise manifest.Damaged(f"{entry(k)}: {reason}") from error
    return {
        name: put(values[name] if like.size else np.zeros(like.shape, like.dtype), like.sharding)
        for name, like in expected.items()
    }


def elsewhere(expected: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays of a stage of another process, as shapes only."""
    return {name: absent(like, like.sharding) for name, like in expected.items()}


def fail(folder: pathlib.Path) -> None:
    """Reports to the waiting process that this process's stores will not be written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FAILED).touch()


def wait(folder: pathlib.Path, stages: int, abandoned: threading.Event) -> None:
    """Waits until the stores of all stages exist.

    Args:
      folder: as given to `write`.
      stages: K.
      abandoned: ends the wait when set.

    Raises:
      RuntimeError: a store is missing; the incomplete checkpoint is removed.
    """
    end = time.monotonic() + SECONDS
    reason = ""
    while missing := [k for k in range(stages) if not (folder / entry(k)).exists()]:
        if (folder / _FAILED).exists():
            reason = "another process could not write its part"
        elif abandoned.wait(0.05) or time.monotonic() > end:
            reason = f"the part of stage {missing[0]} did not come"
        if reason:
            shutil.rmtree(folder.parent, ignore_errors=True)
            raise RuntimeError(reason)


def spec(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """The TensorStore spec of an array in a stage's store."""
    files = {"driver": "file", "path": f"{folder}/"}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": files, "path": f"{name}/"},
    }


def entry(k: int) -> str:
    """The name of stage k's store."""
    return f"stage_{k}"


def leaf(section: str, i: int) -> str:
    """The name of an array of a section."""
    return f"{section}/{i}"


def names(sizes: Mapping[str, int]) -> list[str]:
    """The names of all arrays of sections with these sizes."""
    return [leaf(section, i) for section, size in sizes.items() for i in range(size)]


def remove(path: pathlib.Path) -> None:
    """Removes a checkpoint, or a file or link of that name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
