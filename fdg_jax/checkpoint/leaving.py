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
          failed: whether an error ends the program, or what is known of it.
        """


_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


def finish_at_exit(saver: Saver) -> None:
    """Makes the program's exit wait for the save of ``saver`` in progress.

    Called when a save begins, so that this comes before whatever was to come at the program's end.

    Args:
      saver: not kept alive by this.
    """
    _savers.add(saver)
    _register()


@functools.cache
def _register() -> None:
    atexit.register(_finish)


def _finish() -> None:
    for saver in list(_savers):
        saver.leave(failed=True)
