"""accelerator.json: the rows of all finished pieces, written after each."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.accelerating import training
from experiments.accelerating.piece import MARK, Outcome, Piece
from experiments.common.errors import UsageError
from experiments.common.workdir import Workdir, check, local_path
from fdg_jax.distributed import PAUSED

FILE = "accelerator.json"
FILES = (FILE, "accelerator.md", "accelerator.png")
FOLDERS = ("smoke", "training")
DONE, FAILED, STOPPED = "done", "failed", "stopped"
# Properties of the machine that all rows must share.
SAME = ("device_kind", "versions")


class Record:
    """The results in a workdir.

    Args:
      path: --workdir.
      settings: settings shared by all pieces.

    Raises:
      UsageError: the folder contains something else, or a record with other settings.

    Attributes:
      rows: by the piece's name: part, state, seconds, error, and results.
    """

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self.path = local_path(path, "--workdir")
        self.settings = settings
        self.machine: dict[str, Any] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        known = [*FILES, *FOLDERS, *(f".{name}.tmp" for name in FILES)]
        there = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        others = [name for name in there if name not in known]
        if others or (there and FILE not in there):
            held = ", ".join((others or there)[:3])
            raise UsageError(
                f"--workdir={path}: holds something else ({held}); name an empty folder, or one of "
                "experiments.accelerator"
            )
        check(path, overwrite=True, files=FILES)
        if FILE in there:
            self._read(path)
        self._out = Workdir(path, overwrite=True, files=FILES, resume=True)

    def _read(self, path: str) -> None:
        try:
            found = json.loads((self.path / FILE).read_text())
            settings, self.machine, self.rows = (
                dict(found[name]) for name in ("settings", "machine", "rows")
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--workdir={path}: {FILE} cannot be read ({error}); name another folder"
            ) from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise UsageError(
                    f"--{name}={value}: {path} was begun with {settings.get(name)}; give that to "
                    "go on, or name another folder"
                )

    def of_machine(self, found: dict[str, Any]) -> None:
        """Sets the machine; raises `UsageError` if the rows are from another one."""
        for name in SAME:
            if self.machine and self.machine[name] != found[name]:
                raise UsageError(
                    f"--workdir={self.path}: its rows have {name} {self.machine[name]}, this "
                    f"machine has {found[name]}; name another folder"
                )
        self.machine = self.machine or found

    def pending(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces without a final row."""
        return [p for p in pieces if self.rows.get(p.name, {}).get("state") not in (DONE, FAILED)]

    def forget_failed(self) -> None:
        """Removes failed pieces, so that they run again."""
        self.rows = {name: row for name, row in self.rows.items() if row["state"] != FAILED}

    def expected(self, piece: Piece) -> float:
        """Expected seconds of a piece: twice its last attempt, or the slowest of its group."""
        row = self.rows.get(piece.name, {})
        if piece.resumes:
            return piece.expected
        if row:
            return 2.0 * float(row["seconds"])
        took = [
            float(row["seconds"])
            for row in self.rows.values()
            if piece.group and row["group"] == piece.group and row["state"] == DONE
        ]
        return max(took, default=piece.expected)

    def note(self, piece: Piece, outcome: Outcome, whole: bool) -> dict[str, Any]:
        """Adds and returns the row of a piece that was run.

        Args:
          piece: the piece.
          outcome: its outcome.
          whole: whether it had the command's whole time; if that was not enough, it has failed.
        """
        before = self.rows.get(piece.name, {})
        seconds = outcome.seconds + (before.get("seconds", 0.0) if piece.resumes else 0.0)
        row = {"part": piece.part, "group": piece.group, "seconds": round(seconds, 2)}
        state, error = DONE, None
        if outcome.cut and not (piece.resumes and outcome.status == 0):
            state = FAILED if whole and not piece.resumes else STOPPED
            if state == FAILED:
                error = f"not finished in {outcome.seconds:.0f} s"
        elif piece.resumes and outcome.status == PAUSED:
            state = STOPPED
        elif outcome.status:
            state, error = FAILED, outcome.error
        row |= {"state": state, "error": error, "found": {}}
        if piece.part == "training":
            row["found"] = training.read(piece)
        elif state == DONE and piece.part == "times":
            row["found"] = found_in(outcome)
        self.rows[piece.name] = row
        return row

    def write(self, markdown: str, picture: bytes, remaining: int) -> None:
        """Writes all three files atomically, the record first."""
        content = {
            "settings": self.settings,
            "machine": self.machine,
            "remaining": remaining,
            "rows": self.rows,
        }
        self._out.write_json(FILE, content)
        self._out.write_bytes(FILES[1], markdown.encode())
        self._out.write_bytes(FILES[2], picture)


def found_in(outcome: Outcome) -> dict[str, Any]:
    """The results printed by a process."""
    lines = [line for line in outcome.out.splitlines() if line.startswith(MARK)]
    if not lines:
        raise UsageError(f"a process printed no result: {outcome.error}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return found


def folder(path: str, name: str) -> pathlib.Path:
    """A folder of the workdir, absolute."""
    return (local_path(path, "--workdir") / name).absolute()
