"""Waits for saves in progress when a program ends."""

from __future__ import annotations

import atexit
import functools
import weakref
from typing import Protocol


class Saver(Protocol):
    """An object that may have a save in progress."""

    def leave(self, failed: bool) -> None:
        """Waits for the save.

        Args:
          failed: whether an error ends the program, or may do so.
        """


_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


def finish_at_exit(saver: Saver) -> None:
    """Makes the program's exit wait for a save of ``saver`` in progress.

    Called when a save begins: atexit runs handlers in reverse order, so earlier ones run after it.

    Args:
      saver: weakly referenced.
    """
    _savers.add(saver)
    _register()


@functools.cache
def _register() -> None:
    atexit.register(_finish)


def _finish() -> None:
    for saver in list(_savers):
        saver.leave(failed=True)
