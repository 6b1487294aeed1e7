"""Defers Ctrl-C until a step has finished and the state is consistent.

Python runs a signal's handler between two instructions of the main thread. Raised inside of a step,
or before the caller has stored what it returns, an exception would take the state with it: its
buffers are donated. So handlers that may raise wait until the next step begins, or for a moment.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# Signals whose handlers raise: Ctrl-C, the end of a job, a time that is up.
_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
# A signal that no later step heeds is heeded after so many seconds. Another step is likely to begin
# within the first of them.
_PATIENCE, _SOON = 0.2, 0.1


class _Deferral:
    """The state of signal deferral in the main thread: whether active, and pending signals."""

    def __init__(self) -> None:
        self.inside = False
        self.stepped = 0.0  # when the last step ended
        self.pending: dict[int, _Handler] = {}
        self.files = {__file__}

    def wait(self, number: int, handler: _Handler) -> None:
        """Queues a signal."""
        if number not in self.pending:
            self.pending[number] = handler
            _thread.start_new_thread(self._again, (number,))

    def heed(self) -> None:
        """Calls the handlers of queued signals."""
        while self.pending:
            number, handler = self.pending.popitem()
            handler.inner(number, None)

    def _again(self, number: int) -> None:
        time.sleep(_PATIENCE)
        if self.pending.pop(number, None):
            # To the main thread, so that what it waits for ends.
            signal.pthread_kill(threading.main_thread().ident or 0, number)


_deferral = _Deferral()


class _Handler:
    """A signal handler that is deferred while a state is inconsistent.

    Args:
      inner: the program's own, or Python's.
    """

    def __init__(self, inner: Callable[[int, FrameType | None], Any]) -> None:
        self.inner = inner

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal, or queues it."""
        file = None if frame is None else frame.f_code.co_filename
        # Where a step begins soon, the caller expects an exception there. At a loop's jump back
        # CPython 3.11 does not see that a `try` is around it.
        steps = time.monotonic() - _deferral.stepped < _SOON
        if _deferral.inside or file is None or file in _deferral.files or steps:
            _deferral.wait(number, self)
        else:
            self.inner(number, frame)


def protect(file: str) -> None:
    """Also defers signals while functions of this file return."""
    _deferral.files.add(file)


class deferred:
    """Defers signal handlers while buffers are being donated.

    A signal that comes inside is heeded when the next step begins, before it changes anything, or a
    moment later where no step follows: Python's KeyboardInterrupt, and what handlers of the
    program do. Other threads, in which Python runs no handlers, are left alone.

    Raises:
      KeyboardInterrupt: on entry, for a Ctrl-C that came in an earlier step; and what else a
        handler raises.
    """

    def __enter__(self) -> None:
        self._main = threading.current_thread() is threading.main_thread()
        if not self._main:
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and not isinstance(handler, _Handler):
                signal.signal(number, _Handler(handler))
        _deferral.heed()
        _deferral.inside = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._main:
            _deferral.inside = False
            _deferral.stepped = time.monotonic()
