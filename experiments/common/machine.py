"""The machine: cores, load by other programs, and whether timings are fair."""

from __future__ import annotations

import os
import pathlib
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax

import fdg_jax as fdg

STAT = pathlib.Path("/proc/stat")
# Processor time has a resolution of 0.01 s; shorter intervals would only show noise.
SHORTEST_SECONDS = 0.5
# Fields of /proc/stat except idle and iowait; user already includes guests.
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


class Usage(NamedTuple):
    """Processor seconds since an arbitrary time.

    Attributes:
      wall: wall-clock seconds.
      busy: used by all processes, on the cores available to this one; None if unavailable.
      idle: the rest.
      own: used by this program.
    """

    wall: float
    busy: float | None
    idle: float
    own: float


def cores() -> int:
    """The number of processor cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usage(processes: Sequence[int] = ()) -> Usage:
    """The processor time used so far.

    Args:
      processes: ids of running processes that belong to this program.
    """
    busy, idle = _all_processes()
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return Usage(time.monotonic(), busy, idle, own + sum(map(_one_process, processes)))


def cores_of_others(before: Usage, after: Usage) -> float | None:
    """The mean number of cores used by other programs between two moments.

    Returns:
      Cores, or None if unavailable or if the interval is too short.
    """
    wall = after.wall - before.wall
    if before.busy is None or after.busy is None or wall < SHORTEST_SECONDS:
        return None
    busy = after.busy - before.busy
    # A sandbox may show a file of zeros; a real one accounts for the time of every core.
    if busy + after.idle - before.idle < 0.5 * wall * cores():
        return None
    return max(busy - (after.own - before.own), 0.0) / wall


def load() -> tuple[float, ...] | None:
    """The load averages of the last 1, 5 and 15 minutes, or None if unavailable."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def at_rest(max_load: float, seconds: float = 2.0) -> tuple[dict[str, Any], str | None]:
    """Observes the idle machine for a while.

    The load average lags by a minute, so it is only used if processor time is unavailable.

    Args:
      max_load: the number of cores that other programs may use.
      seconds: the duration.

    Returns:
      The findings, and the reason why a comparison would not be fair, or None.
    """
    averages = load()
    before = usage()
    time.sleep(seconds)
    others = cores_of_others(before, usage())
    found: dict[str, Any] = {"load_average": averages and list(averages), "cores_of_others": others}
    if others is not None and others > max_load:
        return found, f"other programs used {others:.2f} cores before it began"
    if others is None and averages is not None and averages[0] > max_load:
        return found, f"the load average was {averages[0]:.2f} before it began"
    return found, None


def _all_processes() -> tuple[float | None, float]:
    """Busy and idle seconds of the cores available to this process."""
    try:
        lines = STAT.read_text().splitlines()
    except OSError:
        return None, 0.0
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    busy = idle = 0
    for line in lines:
        name, *numbers = line.split()
        core = name.removeprefix("cpu")
        if name == core or not core.isdigit() or (allowed and int(core) not in allowed):
            continue
        ticks = dict(zip(FIELDS, map(int, numbers), strict=False))
        busy += sum(ticks.get(field, 0) for field in BUSY)
        idle += ticks.get("idle", 0) + ticks.get("iowait", 0)
    second = os.sysconf("SC_CLK_TCK")
    return busy / second, idle / second


def _one_process(pid: int) -> float:
    """Processor seconds of another process; 0 if unavailable."""
    try:
        # The program's name, in brackets, may contain anything, so fields follow the last one.
        numbers = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def environment() -> dict[str, Any]:
    """Versions and devices, for reproducibility."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "grain")
    return {
        "versions": {
            "python": platform.python_version(),
            "fdg_jax": fdg.__version__,
            **{name: metadata.version(name) for name in packages},
        },
        "devices": [str(d) for d in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": cores(),
    }
