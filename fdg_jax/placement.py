"""Which devices a stage lives on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

BATCH_AXIS = "data"


def stage_meshes(num_stages: int, devices: Sequence[jax.Device] | None = None) -> list[Mesh]:
    """One mesh per stage.

    Args:
      num_stages: K.
      devices: D devices. With D >= K they make K contiguous groups of D // K, what is left over is
        not used, with a warning. With D < K neighbouring stages share a device. None: one device
        per stage, the first of ``jax.devices()``.

    Returns:
      K meshes with the one axis "data".

    Raises:
      ValueError: no device, or one given twice.

    Example:
      >>> [mesh.size for mesh in stage_meshes(2)]
      [1, 1]
    """
    chosen = list(jax.devices()[:num_stages] if devices is None else devices)
    if not chosen:
        raise ValueError(
            "devices=[]: a pipeline needs at least one device; None takes jax.devices()"
        )
    if len(set(chosen)) < len(chosen):
        raise ValueError(
            f"devices={chosen}: a device is named twice; name each once, stages may share"
        )
    if len(chosen) < num_stages:
        groups = [[chosen[k * len(chosen) // num_stages]] for k in range(num_stages)]
    else:
        size = len(chosen) // num_stages
        groups = [chosen[k * size : (k + 1) * size] for k in range(num_stages)]
        if size * num_stages < len(chosen):
            warnings.warn(
                f"devices: {len(chosen)} do not divide into {num_stages} stages; "
                f"{len(chosen) - size * num_stages} stay unused",
                stacklevel=3,
            )
    # Auto: the stage's programs are an arbitrary user's, who does not write shardings.
    return [Mesh(np.array(group), (BATCH_AXIS,), axis_types=(AxisType.Auto,)) for group in groups]
