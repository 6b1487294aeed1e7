"""Collectives between processes: agreement on values and copies of arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from fdg_jax.distributed.shutdown import deadline

CONNECT_SECONDS = 120.0


def agree(values: Mapping[str, Any], seconds: float = CONNECT_SECONDS) -> None:
    """Checks that values are equal in every process; every process must call it.

    Args:
      values: JSON data by name.
      seconds: how long a process waits for the others before it ends with an error line and
        status 2.

    Raises:
      ValueError: a value differs between process 0 and another process.
    """
    # With one process, JAX may not be initialised yet.
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    names = sorted(values)
    with deadline(
        seconds, f"process {jax.process_index()}: the others did not answer within {seconds:g} s"
    ):
        if np.ptp(gather(_digest(names)), axis=0).any():
            raise ValueError("processes run different programs: install the same version in each")
        texts = {name: json.dumps(values[name]) for name in names}
        found = gather(np.stack([_digest(text) for text in texts.values()]))
    for name, column in zip(names, np.moveaxis(found, 1, 0), strict=True):
        other = [i for i, digest in enumerate(column) if (digest != column[0]).any()]
        if other and jax.process_index() in (0, *other):
            raise ValueError(
                f"{name}={texts[name]} in process {jax.process_index()}: process "
                f"{other[0] if jax.process_index() == 0 else 0} has another value; give every "
                "process the same"
            )
        if other:
            raise ValueError(f"{name}: process {other[0]} has another value than process 0")


def gather(value: np.ndarray | np.generic) -> np.ndarray:
    """Gathers a value from every process; every process must call it and waits for the others.

    Args:
      value: same shape and dtype in every process, at most 32 bits per element.

    Returns:
      The values, stacked along a new first axis by process.

    Example:
      >>> gather(np.arange(2))
      array([[0, 1]])
    """
    if jax.process_count() == 1:
        return np.asarray(value)[None]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(value))


def fetch(tree: Any, sharding: NamedSharding) -> Any:
    """Copies arrays to the processes with devices of ``sharding``; every process must call it.

    Args:
      tree: replicated arrays of any stage.
      sharding: the replicated sharding of the stage whose processes receive them.

    Returns:
      numpy arrays in those processes, None in others.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    there = jax.device_put(tree, sharding)
    return jax.device_get(there) if sharding.addressable_devices else None


def _digest(value: Any) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(json.dumps(value).encode()).digest(), np.uint8)
