"""Retains memory in the C library's allocator between steps."""

from __future__ import annotations

import ctypes
import os

# Of glibc's <malloc.h>: parameters of mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_SETTINGS = (
    (
        _MMAP_MAX,
        0,
    ),  # large blocks get no mapping of their own, which free() would unmap
    (_ARENA_MAX, 1),  # only the main arena grows without limit; JAX's threads would create others
    (_TRIM_THRESHOLD, -1),  # free memory at the end of that arena is kept
)
_CHOSEN_BY_USER = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Makes the C library retain freed memory, so that later steps have no page faults.

    An XLA program on CPU allocates its intermediate values in every run. By default the C library
    returns such large blocks to the system when they are freed, and the kernel clears and maps
    pages again for the next run, one fault per 4 KiB: a tenth of a step's processor time or more
    (``BENCHMARKS.md``). Retained memory causes no faults. The costs: the process keeps its peak
    size, and its threads share one arena, which adds a few tenths of a millisecond to a step of
    very small programs. Other devices have their own allocators and do not benefit.

    Call it before JAX starts its threads, that is, before any use of a device. It affects the
    whole process, so the library never calls it; the experiments do.

    Returns:
      Whether freed memory is now retained. False if the C library is not glibc (macOS, musl), or
      if a variable ``MALLOC_...`` or ``GLIBC_TUNABLES`` configures the allocator.

    Example:
      >>> keep_freed_memory() in (True, False)
      True

    References:
      mallopt(3), M_MMAP_MAX, M_ARENA_MAX and M_TRIM_THRESHOLD.
    """
    if any(name.startswith(_CHOSEN_BY_USER) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018 - others may number parameters otherwise
    except (OSError, AttributeError, TypeError):
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS)
