"""Ctrl-C arrives between steps, when a state is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# An interrupt that no later step raises is raised anew after so many seconds.
_PATIENCE = 0.2

_pending = False


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Holds back KeyboardInterrupt while buffers are being donated.

    An interrupt that comes inside is raised when the next step begins, before it changes anything,
    or a moment later where no step follows. Handlers of the program's own are left alone, and so
    are other threads, where Python raises no interrupt.

    Raises:
      KeyboardInterrupt: on entry, for one that came in an earlier step.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _raise_pending()
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if _pending:
            timer = threading.Timer(_PATIENCE, _again)
            timer.daemon = True
            timer.start()


def _note(number: int, frame: FrameType | None) -> None:
    global _pending
    _pending = True


def _raise_pending() -> None:
    global _pending
    if _pending:
        _pending = False
        raise KeyboardInterrupt


def _again() -> None:
    global _pending
    if _pending:
        _pending = False
        signal.raise_signal(signal.SIGINT)
