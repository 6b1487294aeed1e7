"""Defers Ctrl-C until a step has finished and the state is consistent.

Python runs signal handlers between two instructions of the main thread. An exception raised inside
a step, or before the caller has stored its result, would lose the state, whose buffers are donated.
So handlers that may raise are deferred to the start of the next step, but only briefly.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# Signals whose handlers may raise: Ctrl-C, the end of a job, an expired timer.
_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
# Seconds after which a signal is handled if no step begins; seconds after a step in which the
# next is likely to begin.
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
            # Sent to the main thread, so that a blocking call there is interrupted.
            signal.pthread_kill(threading.main_thread().ident or 0, number)


_deferral = _Deferral()


class _Handler:
    """A signal handler that is deferred while a state is inconsistent.

    Args:
      inner: the original handler, the program's or Python's.
    """

    def __init__(self, inner: Callable[[int, FrameType | None], Any]) -> None:
        self.inner = inner

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal, or queues it."""
        file = None if frame is None else frame.f_code.co_filename
        # If a step begins soon, the exception is raised there, where callers expect it: CPython
        # 3.11 misses the `try` around a loop for exceptions raised at its backward jump.
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

    A signal received inside is handled at the start of the next step, before anything changes, or
    shortly after if no step follows, by Python's KeyboardInterrupt or the program's handler. Has no
    effect in other threads, where Python runs no handlers.

    Raises:
      KeyboardInterrupt: on entry, for a Ctrl-C received in an earlier step; also any other
        exception of a handler.
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
