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
    ),  # a large block is no mapping of its own, which would be undone when it is freed
    (_ARENA_MAX, 1),  # only the first arena grows at will, and JAX's threads would make others
    (_TRIM_THRESHOLD, -1),  # what is free at the end of that arena stays, too
)
_CHOSEN_BY_USER = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Makes the C library retain freed memory, so that later steps have no page faults.

    A program of XLA on CPU allocates its intermediate values anew whenever it runs. By default the
    C library gives so large a block back to the system when it is freed, and the next run gets
    pages that the kernel has to clear and map again, one fault for every 4 KiB: a tenth of a step's
    processor time, and more (``BENCHMARKS.md``). Kept memory costs no faults. The price: the
    process stays as large as it once was, and its threads share one arena, which costs a step of
    very small programs some tenths of a millisecond. Other devices have allocators of their own,
    and gain nothing.

    Call it before JAX starts its threads, that is before anything touches a device. It holds for
    the whole process, so the library never calls it by itself; the experiments do.

    Returns:
      Whether the C library does so now. False where it is not glibc (macOS, musl), and where the
      environment chooses already, by a variable ``MALLOC_...`` or ``GLIBC_TUNABLES``.

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
