"""Terminal output: a progress bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# Without a terminal, minimum seconds between progress lines.
PLAIN_SECONDS = 30.0


class Screen:
    """Prints tables and lines, and shows the progress of training.

    Args:
      total: number of steps of the run.
      console: the destination; None: standard output.
      shown: False for a process that prints nothing.
    """

    def __init__(self, total: int, console: Console | None = None, *, shown: bool = True) -> None:
        # A pipe has no width, and tables should not be cut at 80 columns.
        self.console = console or Console(highlight=False, quiet=not shown)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, 120)
        self.total = total
        self._progress: Progress | None = None
        self._last_plain = self._started = time.monotonic()

    def __enter__(self) -> Screen:
        self._last_plain = self._started = time.monotonic()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self.console,
                expand=True,
            )
            self._task = self._progress.add_task("", total=self.total, numbers="compiling")
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def line(self, text: str = "") -> None:
        """Prints a line of text, above the progress bar if there is one."""
        self.console.print(text, markup=False, soft_wrap=True)

    def advance(
        self, step: int, loss: float, error: float, speed: float, unit: str = "images"
    ) -> None:
        """Shows the state after ``step`` steps; ``speed`` in units per second."""
        numbers = f"loss {loss:.3f}  error {100 * error:4.1f} %  {speed:,.0f} {unit}/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        if now - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = now
            left = (now - self._started) * (self.total - step) / max(step, 1)
            self.line(f"step {step}/{self.total}  {numbers}  {left:.0f} s left")

    def table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table with right-aligned numbers."""
        table = Table(title=title, title_justify="left")
        for i, head in enumerate(heads):
            # Names are not wrapped; heads that are too long are.
            first = i == 0
            table.add_column(
                head, justify="left" if first else "right", no_wrap=first, overflow="fold"
            )
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
