"""The directory of a run: config.json, metrics.jsonl, summary.json, curves.png."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Protocol

from experiments.common.errors import UsageError
from fdg_jax.checkpoint.paths import local

# Seconds to wait for space on a full disk.
PATIENCE = 20.0
FILES = (
    *("config.json", "metrics.jsonl", "summary.json", "curves.png"),
    *("timeline.json", "timeline.png"),
)


class Writer(Protocol):
    """A receiver of the lines of metrics.jsonl."""

    def write(self, number: int, line: dict[str, Any]) -> None:
        """Writes line ``number``, from 0; non-finite values are None."""

    def close(self) -> None:
        """Writes pending lines."""


class Workdir:
    """Writes a run's files atomically; metrics are appended line by line.

    Args:
      path: the folder; created if missing.
      overwrite: whether files of an earlier run may be removed.
      files: names of these files.
      folders: folders of an earlier run, removed before its files.
      resume: whether an earlier run is resumed, so that its files stay.
      writes: whether this process writes the files; only one of several does.

    Raises:
      UsageError: the folder cannot be written, or contains a run that may not be overwritten.
    """

    def __init__(
        self,
        path: str,
        *,
        overwrite: bool,
        files: Sequence[str] = FILES,
        folders: Sequence[str] = (),
        resume: bool = False,
        writes: bool = True,
    ) -> None:
        self.path = local_path(path, "--workdir")
        self.writes = writes
        self.lines = 0  # number of lines of metrics.jsonl
        self.writers: list[Writer] = []
        if not writes:
            return
        check(path, overwrite=overwrite or resume, files=files)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not resume:
                for name in folders:
                    if (self.path / name).exists():
                        shutil.rmtree(self.path / name)
                # config.json is removed last, so that the folder remains a run after a kill.
                for name in reversed(files):
                    (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes one of the JSON files atomically."""
        self.write_bytes(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes one of the files atomically.

        Raises:
          UsageError: it cannot be written; an existing file is unchanged.
        """
        if not self.writes:
            return
        temporary = self.path / f".{name}.tmp"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, self.path / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._unwritten(name, error) from error

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl; non-finite numbers become null, as JSON has none.

        Raises:
          UsageError: it cannot be written.
        """
        if not self.writes:
            return
        clean = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in line.items()}
        path = self.path / "metrics.jsonl"
        deadline = time.monotonic() + PATIENCE
        while True:
            size = path.stat().st_size if path.is_file() else 0
            try:
                with path.open("a") as file:
                    file.write(json.dumps(clean, allow_nan=False) + "\n")
                break
            except OSError as error:
                if path.is_file():
                    os.truncate(path, size)  # removes part of a line
                # A checkpoint that is too large fills the disk until it has failed.
                if error.errno != errno.ENOSPC or time.monotonic() > deadline:
                    raise self._unwritten("metrics.jsonl", error) from error
                time.sleep(0.1)
        for writer in self.writers:
            writer.write(self.lines, clean)
        self.lines += 1

    def cut_metrics(self, lines: int) -> None:
        """Keeps the first ``lines`` of metrics.jsonl.

        Raises:
          UsageError: there are fewer lines.
        """
        if not self.writes:
            return
        path = self.path / "metrics.jsonl"
        there = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if len(there) < lines:
            raise UsageError(
                f"--workdir={self.path}: metrics.jsonl has {len(there)} lines, the checkpoint was "
                f"taken after {lines}; put the file back, or add --overwrite"
            )
        if there:
            self.write_bytes("metrics.jsonl", b"".join(there[:lines]))
        self.lines = lines

    def _unwritten(self, name: str, error: OSError) -> UsageError:
        reason = error.strerror or error
        return UsageError(
            f"--workdir={self.path}: {name} cannot be written ({reason}); mend that, and the same "
            "command goes on from the newest checkpoint"
        )

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]


def read_json(path: str, name: str) -> dict[str, Any]:
    """Reads one of the JSON files of the run in ``path``."""
    value: dict[str, Any] = json.loads((pathlib.Path(path).expanduser() / name).read_text())
    return value


def local_path(path: str, flag: str) -> pathlib.Path:
    """An absolute path in the local file system, ``~`` expanded.

    Args:
      path: a folder or file, which need not exist.
      flag: its flag, for the error.

    Raises:
      UsageError: not a local path, such as ``gs://bucket/run``.

    Example:
      >>> local_path("/runs/a", "--workdir").as_posix()
      '/runs/a'
    """
    try:
        return local(path, flag)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def check(path: str, *, overwrite: bool, files: Sequence[str] = FILES) -> None:
    """Checks that a run may start in ``path``; leaves nothing behind."""
    folder = local_path(path, "--workdir")
    try:
        taken = [name for name in files if (folder / name).exists()]
        if any((folder / name).is_dir() for name in taken):
            raise IsADirectoryError(f"{path} has a folder named {' or '.join(taken)}")
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{path} is a file")
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except (OSError, RuntimeError) as error:
        raise _unwritable(path, error) from error
    if taken and not overwrite:
        raise UsageError(
            f"--workdir={path}: holds {', '.join(taken)} already; name another folder, or add "
            "--overwrite"
        )


def _unwritable(path: str, error: OSError | RuntimeError) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"--workdir={path}: cannot be written ({reason}); name another folder")
