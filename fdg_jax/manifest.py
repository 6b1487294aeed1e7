"""The manifest of a checkpoint: what made it, what it holds, and whether it is whole."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np

from fdg_jax.layer import PyTree
from fdg_jax.pipeline import Pipeline

FORMAT = 1
NAME = "manifest.json"
# Where these differ a checkpoint cannot be restored; in the rest only the last bits may differ.
BINDING = ("format", "stages", "schedule", "gradient")
_LARGEST = 1 << 26  # bytes: what strangers made is not read without bound


def configuration(pipe: Pipeline) -> dict[str, Any]:
    """What a checkpoint must agree on with the pipeline that restores it, fit for JSON.

    Args:
      pipe: the pipeline.

    Returns:
      Values by name; those named in `BINDING` must be equal, the others should be.
    """
    schedule = pipe.schedule
    # Orders and options of a schedule show in its actions.
    actions = hashlib.sha256(str(schedule).encode()).hexdigest()[:8]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "format": FORMAT,
        "stages": pipe.num_stages,
        "schedule": f"{schedule.name} (microbatches {schedule.microbatches}, reduction "
        f"{schedule.reduction}, versions {schedule.versions}, actions {actions})",
        "gradient": pipe.gradient,
        "jax": jax.__version__,
        "platform": pipe.stages[0].mesh.devices.flat[0].platform,
        "cores": cores,
        "devices": [stage.mesh.size for stage in pipe.stages],
    }


def write(folder: pathlib.Path, body: dict[str, Any]) -> None:
    """Adds the manifest to a checkpoint that is otherwise whole.

    Args:
      folder: the checkpoint.
      body: what the manifest says, fit for JSON; the hashes of the other files are added.
    """
    files = {str(path.relative_to(folder)): _hash(path) for path in _files(folder)}
    body = {**body, "files": files}
    with (folder / NAME).open("w") as file:
        json.dump({"sha256": _body_hash(body), "body": body}, file)
        file.flush()
        os.fsync(file.fileno())


def read(folder: pathlib.Path) -> dict[str, Any]:
    """What the manifest says, if every file is there and has not changed since.

    Args:
      folder: the checkpoint.

    Returns:
      The body given to `write`.

    Raises:
      OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: it is not whole.
    """
    whole = json.loads(_text(folder / NAME))
    body: dict[str, Any] = whole["body"]
    if whole["sha256"] != _body_hash(body):
        raise ValueError(f"{NAME} has changed")
    there = {str(p.relative_to(folder)): p for p in _files(folder)}
    if there.keys() != body["files"].keys():
        raise ValueError(f"{min(there.keys() ^ body['files'].keys())} is missing or was added")
    for name, expected in body["files"].items():
        if _hash(there[name]) != expected:
            raise ValueError(f"{name} has changed")
    return body


def score(folder: pathlib.Path) -> float:
    """The score that a checkpoint was saved with; infinite where it has none, or none to be read.

    Args:
      folder: the checkpoint; its other files are not looked at.

    Returns:
      The lower the better.
    """
    try:
        found = json.loads(_text(folder / NAME))["body"]["score"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return float(found) if isinstance(found, int | float) else math.inf


def signature(array: np.ndarray | jax.Array) -> list[Any]:
    """Dtype and shape of an array, fit for JSON."""
    return [str(array.dtype), list(array.shape)]


def fit(what: str, found: list[Any], template: PyTree, *, exact: bool) -> None:
    """Checks the arrays of a section before any of them is read.

    Args:
      what: begins the message.
      found: their `signature`.
      template: what the pipeline has there.
      exact: whether the batch axis counts too.

    Raises:
      ValueError: an array is of another dtype or shape, or there are more or fewer.
    """

    def short(dtype: str, shape: list[int]) -> str:
        return f"{dtype}[{','.join(map(str, shape))}]"

    leaves = jax.tree_util.tree_leaves_with_path(template)
    if len(leaves) != len(found):
        raise ValueError(
            f"{what}: the checkpoint has {len(found)} arrays, this pipeline {len(leaves)}; restore "
            "it with the same network and optimizer, or start the run anew"
        )
    for (path, leaf), (dtype, shape) in zip(leaves, found, strict=True):
        skip = 0 if exact else 1
        own = (str(leaf.dtype), len(leaf.shape), list(leaf.shape[skip:]))
        if own != (dtype, len(shape), shape[skip:]):
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)}: the checkpoint has {short(dtype, shape)}, "
                f"this pipeline {short(own[0], list(leaf.shape))}; restore it with the same "
                "network and optimizer, or start the run anew"
            )


def encoded(extra: Any) -> str:
    """``extra`` as text: JSON, with arrays as numbers and bytes marked as such."""
    if isinstance(extra, bytes):
        return "bytes:" + base64.b64encode(extra).decode()
    return "json:" + json.dumps(extra, default=lambda value: jax.device_get(value).tolist())


def decoded(text: str) -> Any:
    """What `encoded` was given."""
    kind, _, rest = text.partition(":")
    return base64.b64decode(rest) if kind == "bytes" else json.loads(rest)


def _text(path: pathlib.Path) -> str:
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{NAME} is too large")
    return path.read_text()


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files but the manifest; a link is one that has no business here."""
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
