"""The manifest of a checkpoint: configuration, contents and checksums."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.typing import Key, PyTree

FORMAT = 2
NAME = "manifest.json"
# These must agree for a checkpoint to be restored; others may only change the last bits.
BINDING = ("format", "stages", "schedule", "gradient", "message_dtype")
_LARGEST = 1 << 26  # bytes: untrusted files are not read without a limit
MOST = 2**31 - 1  # largest counter


class Damaged(ValueError):
    """A checkpoint is damaged; an older one is used. The message is one line.

    Args:
      reason: the defect found.
    """

    def __init__(self, reason: object) -> None:
        super().__init__(short(reason))


def configuration(pipe: Pipeline) -> dict[str, Any]:
    """The configuration that a checkpoint and the restoring pipeline must share, as JSON data.

    Args:
      pipe: the pipeline.

    Returns:
      Values by name; those named in `BINDING` must be equal, the others should be.
    """
    schedule = pipe.schedule
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "format": FORMAT,
        "stages": pipe.num_stages,
        "schedule": f"{schedule.name} ({schedule.fingerprint})",
        "gradient": pipe.gradient,
        "message_dtype": None if pipe.message_dtype is None else pipe.message_dtype.name,
        "jax": jax.__version__,
        "platform": pipe.stages[0].mesh.devices.flat[0].platform,
        "cores": cores,
        "devices": [stage.mesh.size for stage in pipe.stages],
    }


def folder(directory: pathlib.Path, step: int) -> pathlib.Path:
    """The directory of the checkpoint of a step."""
    return directory / f"step-{step:09d}"


def steps(directory: pathlib.Path) -> list[int]:
    """The steps of all checkpoint directories, newest first; they may be damaged."""
    found = [path.name for path in directory.glob("step-*")]
    numbers = [int(name[5:]) for name in found if name[5:].isdecimal()]
    return sorted((n for n in numbers if folder(directory, n).name in found), reverse=True)


def write(folder: pathlib.Path, body: dict[str, Any]) -> None:
    """Adds the manifest to an otherwise complete checkpoint.

    Args:
      folder: the checkpoint.
      body: contents of the manifest, as JSON data; the hashes of the other files are added.
    """
    files = {str(path.relative_to(folder)): _hash(path) for path in _files(folder)}
    body = {**body, "files": files}
    with (folder / NAME).open("w") as file:
        json.dump({"sha256": _body_hash(body), "body": body}, file)
        file.flush()
        os.fsync(file.fileno())


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the manifest; `verify` checks the other files.

    Args:
      folder: the checkpoint.

    Returns:
      The body given to `write`, and the hashes of the files.

    Raises:
      Damaged: the manifest is missing, too large, or has changed.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged("it is no folder")
    try:
        whole = json.loads(_text(folder / NAME))
        body: dict[str, Any] = whole["body"]
        if whole["sha256"] != _body_hash(body):
            raise ValueError(f"{NAME} has changed")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        text = str(error)
        raise Damaged(text if NAME in text else f"{NAME}: {text}") from error
    if not isinstance(body, dict):
        raise Damaged(f"{NAME} has no body")
    return body


def check(body: dict[str, Any], step: int, stages: int) -> None:
    """Checks that a manifest has the form written by `write`.

    Hashes are not sufficient: whoever changes a field can recompute them.

    Args:
      body: the result of `read`, of this format.
      step: the step in the checkpoint's name.
      stages: the number of stages.

    Raises:
      Damaged: a field is missing or malformed.
    """

    def natural(value: object) -> bool:
        return type(value) is int and 0 <= value <= MOST

    def signed(value: object) -> bool:
        match value:
            case [str(), list(shape)]:
                return all(map(natural, shape))
        return False

    def section(value: object) -> bool:
        match value:
            case [str(), list(found)]:
                return all(map(signed, found))
        return False

    def sections(value: object) -> bool:
        return isinstance(value, list) and all(map(section, value))

    forms = {
        "step": natural(body.get("step")) and body["step"] == step,
        "tick": natural(body.get("tick")),
        "origin": natural(body.get("origin"))
        and natural(body.get("tick"))
        and body["origin"] <= body["tick"],
        "counts": _list(body.get("counts"), stages)
        and all(isinstance(own, dict) and natural(own.get("base")) for own in body["counts"]),
        "sections": _list(body.get("sections"), stages) and all(map(sections, body["sections"])),
        "extra": isinstance(body.get("extra"), str),
        "files": isinstance(body.get("files"), dict)
        and all(isinstance(value, str) for value in body["files"].values()),
    }
    for name, fits in forms.items():
        if not fits:
            raise Damaged(f"{NAME}: {name} is missing or of another form")


def verify(folder: pathlib.Path, body: dict[str, Any], most: int = sys.maxsize) -> None:
    """Checks that every file of a checkpoint exists and is unchanged.

    Args:
      folder: the checkpoint.
      body: its manifest, checked.
      most: limit on the total size of its files in bytes; larger ones are not read.

    Raises:
      Damaged: a file is missing, was added, has changed, or is too large.
    """
    try:
        there = {str(p.relative_to(folder)): p for p in _files(folder)}
        if there.keys() != body["files"].keys():
            raise ValueError(f"{min(there.keys() ^ body['files'].keys())} is missing or was added")
        if sum(path.stat().st_size for path in there.values()) > most:
            raise ValueError(f"its files are larger than {most} bytes, and its arrays are not")
        for name, expected in body["files"].items():
            if _hash(there[name]) != expected:
                raise ValueError(f"{name} has changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(error) from error


def score(folder: pathlib.Path) -> float:
    """The score of a checkpoint; infinite if it has none or cannot be read.

    Args:
      folder: the checkpoint; its other files are not read.

    Returns:
      The score; lower is better.
    """
    try:
        found = json.loads(_text(folder / NAME))["body"]["score"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return found if isinstance(found, float) and not math.isnan(found) else math.inf


def signature(array: np.ndarray | jax.Array) -> list[Any]:
    """Dtype and shape of an array, as JSON data."""
    return [str(array.dtype), list(array.shape)]


def fit(what: str, found: list[Any], template: PyTree, *, exact: bool) -> None:
    """Checks the arrays of a section before reading any.

    Args:
      what: prefix of the error message.
      found: the `signature` of each array.
      template: the pipeline's own arrays of that section.
      exact: whether the batch axis must be equal too; if not, it may be smaller.

    Raises:
      ValueError: dtypes, shapes or the number of arrays differ.
    """

    def signed(dtype: str, shape: list[int]) -> str:
        return short(f"{dtype}[{','.join(map(str, shape))}]")

    leaves = jax.tree_util.tree_leaves_with_path(template)
    if len(leaves) != len(found):
        raise ValueError(
            f"{what}: the checkpoint has {len(found)} arrays, this pipeline {len(leaves)}; restore "
            "it with the same network and optimizer, or start the run anew"
        )
    for (path, leaf), (dtype, shape) in zip(leaves, found, strict=True):
        skip = 0 if exact else 1
        own = (str(leaf.dtype), len(leaf.shape), list(leaf.shape[skip:]))
        larger = any(there > here for there, here in zip(shape, leaf.shape, strict=False))
        if own != (dtype, len(shape), shape[skip:]) or larger:
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)}: the checkpoint has {signed(dtype, shape)}, "
                f"this pipeline {signed(own[0], list(leaf.shape))}; restore it with the same "
                "network, optimizer and batch size, or start the run anew"
            )


def short(text: object) -> str:
    """Untrusted text, on one line and truncated."""
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else line[:300] + " ..."


def random_key(saved: Any) -> Key:
    """The root key from its implementation and its data.

    Raises:
      Damaged: they do not form a key.
    """
    try:
        kind, data = saved
        key = jax.random.wrap_key_data(jnp.asarray(np.asarray(data, np.uint32)), impl=kind)
        if key.shape != ():
            raise ValueError(f"a key has not the shape {key.shape}")
    except (ValueError, TypeError, OverflowError, KeyError) as error:
        raise Damaged(f"{NAME}: key: {error}") from error
    return key


def _list(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _text(path: pathlib.Path) -> str:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is missing or no plain file")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path.name} is too large")
    return path.read_text()


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files except the manifest; a link is an error."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in found:
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path.name} is no plain file")
    return sorted(path for path in found if path != folder / NAME)


def _hash(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _body_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
