"""A cache of decoded data sets and other files on disk.

The folder may be deleted at any time.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from experiments.common.workdir import local_path
from experiments.data.arrays import Arrays

_LOG = logging.getLogger(__name__)
# Part of the key: increase it when decoding or the file's layout changes.
_FORMAT = 2
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def directory() -> Path:
    """``$FDG_CACHE_DIR``, else ``$XDG_CACHE_HOME/fdg_jax``, else ``~/.cache/fdg_jax``."""
    if own := os.environ.get("FDG_CACHE_DIR"):
        return local_path(own, "FDG_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "fdg_jax"


def key(spec: str, root: Path, files: Iterable[str]) -> str:
    """The sha256 of a source and its files.

    Args:
        spec: Identifies the source and how it is read.
        root: The folder of the files.
        files: Files below `root`, hashed by relative path, size and modification time.
    """
    listing = []
    for file in files:
        status = os.stat(file)
        listing.append((file.removeprefix(str(root)), status.st_size, status.st_mtime_ns))
    text = json.dumps([_FORMAT, spec, str(root.resolve()), sorted(listing)])
    return hashlib.sha256(text.encode()).hexdigest()


def cached(name: str, decode: Callable[[], Arrays]) -> Arrays:
    """Reads the entry `name`, or creates it with `decode`.

    A damaged entry is decoded again. If the entry cannot be written, the program continues.
    """
    path = directory() / f"{name}.npz"
    found = _read(path)
    if found is not None:
        return found
    arrays = decode()
    try:
        _write(path, arrays)
    except OSError as error:
        _LOG.warning("decoded images are not cached in %s: %s", path.parent, error)
    return arrays


def _read(path: Path) -> Arrays | None:
    try:
        with zipfile.ZipFile(path) as file:
            fields = {field: _member(file, field) for field in Arrays._fields}
        names = tuple(str(name) for name in fields.pop("class_names"))
        arrays = Arrays(**fields, class_names=names)
        arrays.check()
    except FileNotFoundError:
        return None
    # zipfile, zlib and numpy, which evaluates headers as Python, raise many types.
    except Exception as error:
        _LOG.warning("ignoring the damaged cache entry %s: %s", path, error)
        return None
    return arrays


def _member(file: zipfile.ZipFile, field: str) -> Any:
    """Reads one array, with a check of its size: numpy would allocate what the header requests."""
    info = file.getinfo(f"{field}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{field} is compressed")
    with file.open(info) as member:
        version = np.lib.format.read_magic(member)
        shape, _, dtype = _HEADERS[version](member)
        if dtype.hasobject:
            raise ValueError(f"{field} holds objects")
        if member.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"{field} has not the size that its header says")
        member.seek(0)
        return np.lib.format.read_array(member, allow_pickle=False)


def _write(path: Path, arrays: Arrays) -> None:
    fields = arrays._asdict() | {"class_names": np.array(arrays.class_names)}
    write(path, lambda file: np.savez(file, allow_pickle=False, **fields))


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Writes a file of the cache atomically.

    Args:
        path: The file; missing folders are created.
        fill: Writes the content into an open file.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A temporary file, renamed when complete: two programs may write the same entry.
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            fill(file)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            file.close()
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
