"""Times of a network's layers, measured once and stored in the cache.

The times that balance the stages must be the same when a run is repeated, resumed or compared with
another: the file ensures that on one machine. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pathlib
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jaxlib

import fdg_jax as fdg
from experiments.common.machine import cores
from experiments.data import cache
from fdg_jax.layer import Layer
from fdg_jax.partition import units_of
from fdg_jax.partition.layer_cost import layer_costs
from fdg_jax.typing import PyTree

_LOG = logging.getLogger(__name__)
# Part of the key: increase it when the file's layout changes.
_FORMAT = 1
_DAMAGED = (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError)


class Times(NamedTuple):
    """Seconds of each layer's forward and backward, and a line about their origin."""

    seconds: list[float]
    note: str


def times(layers: Sequence[Layer], example: PyTree, network: Mapping[str, Any]) -> Times:
    """The cached times, or newly measured ones.

    A damaged file is replaced. If the cache cannot be written, the program continues.

    Args:
      layers: the network, input first.
      example: one device's part of a batch: arrays or ``jax.ShapeDtypeStruct``.
      network: identifies the layers, as JSON data: name, classes ...

    Returns:
      Python floats, one per layer before which `fdg_jax.partition` may cut, and the line.
    """
    units = units_of(layers)
    settings = key(example, network)
    path = file(settings)
    found = _read(path, settings, len(units))
    if found is not None:
        return Times(found, f"times of {len(units)} layers measured before, {path}")
    began = time.perf_counter()
    seconds = [float(value) for value in layer_costs(units, example, "time")]
    took = time.perf_counter() - began
    content = {"key": settings, "seconds": seconds}
    try:
        cache.write(path, lambda f: f.write((json.dumps(content, indent=2) + "\n").encode()))
    except OSError as error:
        _LOG.warning("the layers' times are not cached in %s: %s", path.parent, error)
    return Times(seconds, f"measured {len(units)} layers in {took:.1f} s")


def key(example: PyTree, network: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the times depend on; arguments as in `times`."""
    device = jax.devices()[0]
    return {
        "format": _FORMAT,
        **network,
        "inputs": [[list(leaf.shape), str(leaf.dtype)] for leaf in jax.tree.leaves(example)],
        "x64": bool(jax.config.jax_enable_x64),  # type: ignore[attr-defined]
        "platform": device.platform,
        "device_kind": device.device_kind,
        "processor": _processor(),
        "cores": cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "fdg_jax": fdg.__version__,
        "source": _source(),
    }


def file(settings: Mapping[str, Any]) -> pathlib.Path:
    """The file with the times of ``settings``."""
    text = json.dumps(settings, sort_keys=True)
    name = f"{settings.get('model', 'layers')}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return cache.directory() / "layer_times" / f"{name}.json"


def _processor() -> str:
    """The processor's name: several machines may share a cache, and JAX only says "cpu"."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _source() -> str:
    """The sha256 of the library, since times may change between releases."""
    root = pathlib.Path(fdg.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _read(path: pathlib.Path, settings: Mapping[str, Any], count: int) -> list[float] | None:
    try:
        content = json.loads(path.read_bytes())
        seconds = [float(value) for value in content["seconds"]]
        if content["key"] != settings:
            raise ValueError("it was measured for something else")
        if len(seconds) != count or not all(0 < v < math.inf for v in seconds):
            raise ValueError(f"it does not hold {count} times")
    except FileNotFoundError:
        return None
    except _DAMAGED as error:
        _LOG.warning("measuring anew, for %s is damaged: %s", path, error)
        return None
    return seconds
