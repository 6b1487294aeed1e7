"""Describes this machine, in its own process, since a device has one user at a time."""

from __future__ import annotations

import json
import sys
from typing import Any

from experiments.accelerating.piece import MARK, Piece

EXPECTED_SECONDS = 20.0


def piece() -> Piece:
    """The piece that describes the devices."""
    command = (sys.executable, "-m", "experiments.accelerating.host")
    return Piece("machine", "machine", command, EXPECTED_SECONDS)


def describe() -> dict[str, Any]:
    """Versions, devices, platform, and the bytes that a device may use (None: unknown)."""
    import jax

    from experiments.common import machine

    statistics = jax.devices()[0].memory_stats() or {}
    return {
        **machine.environment(),
        "platform": jax.default_backend(),
        "memory_bytes": statistics.get("bytes_limit"),
    }


if __name__ == "__main__":
    print(MARK + json.dumps(describe()))
