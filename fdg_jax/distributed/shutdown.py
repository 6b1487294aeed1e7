"""Shutdown of a process, together with the others or alone."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax

from fdg_jax.distributed import failure_detector

# The exit status of a run that was asked to stop and has saved.
PAUSED = 75


def leave(status: int) -> NoReturn:
    """Ends the process; in a run of several processes at once, without JAX's shutdown barrier.

    Args:
      status: 0, or PAUSED if all processes stop; any other status ends the other processes, too.
    """
    if failure_detector.current is not None:
        failure_detector.current.leave(failed=status not in (0, PAUSED))
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            # The end of process 0 aborts the others, which may first report their own errors.
            time.sleep(2 * failure_detector.GRACE)
        os._exit(status)
    sys.exit(status)


def settle() -> None:
    """Called before an error is reported: ends this process if another one was lost."""
    if failure_detector.current is not None:
        time.sleep(2 * failure_detector.GRACE)


@contextlib.contextmanager
def deadline(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with ``message`` if its body takes too long, even inside C++."""

    def end() -> None:
        if failure_detector.current is not None:
            failure_detector.current.leave(failed=True)
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
