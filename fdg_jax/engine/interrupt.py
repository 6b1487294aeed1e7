"""Ctrl-C arrives between steps, when a state is whole.

Python runs a signal's handler between two instructions of the main thread. Raised inside of a step,
or before the caller has stored what it returns, a KeyboardInterrupt would take the state with it:
its buffers are donated. So it is held back until the next step begins, or for a moment.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time
from types import FrameType, TracebackType

# An interrupt that no later step raises is raised anew after so many seconds.
_PATIENCE = 0.2


class _Deferral:
    """Whether an interrupt has to wait, and whether one does; of the main thread."""

    def __init__(self) -> None:
        self.inside = False
        self.pending = False
        self.files = {__file__}

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGINT."""
        if self.inside or frame is None or frame.f_code.co_filename in self.files:
            if not self.pending:
                self.pending = True
                _thread.start_new_thread(self._again, ())
            return
        raise KeyboardInterrupt

    def _again(self) -> None:
        time.sleep(_PATIENCE)
        if self.pending:
            self.pending = False
            signal.raise_signal(signal.SIGINT)


_deferral = _Deferral()


def protect(file: str) -> None:
    """Holds interrupts back as long as a function of this file is being left, too."""
    _deferral.files.add(file)


class deferred:
    """Holds back KeyboardInterrupt while buffers are being donated.

    An interrupt that comes inside is raised when the next step begins, before it changes anything,
    or a moment later where no step follows. Handlers of the program's own are left alone, and so
    are other threads, where Python raises no interrupt.

    Raises:
      KeyboardInterrupt: on entry, for one that came in an earlier step.
    """

    def __enter__(self) -> None:
        self._main = threading.current_thread() is threading.main_thread()
        if not self._main:
            return
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _deferral.handle)
        if _deferral.pending:
            _deferral.pending = False
            raise KeyboardInterrupt
        _deferral.inside = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._main:
            _deferral.inside = False
