"""Validation of directories given by a user."""

from __future__ import annotations

import errno
import os
import pathlib
import re

# pathlib turns "gs://bucket" into "gs:/bucket"; a single letter is a drive.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
# Errors of the user; others, such as a full disk, may be temporary.
_MISTAKES = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EINVAL),
    *(errno.ENAMETOOLONG, errno.ELOOP),
}


def local(path: str | os.PathLike[str], name: str) -> pathlib.Path:
    """An absolute local path with ``~`` expanded.

    Args:
      path: a folder or file, which need not exist.
      name: the argument's name, for the error.

    Returns:
      The path.

    Raises:
      ValueError: it has a scheme, such as ``gs://``, names the home of an unknown user, or is not
        a path.

    Example:
      >>> local("/runs/a", "directory").as_posix()
      '/runs/a'
      >>> local("gs://bucket/a", "directory")
      Traceback (most recent call last):
      ValueError: directory=gs://bucket/a: is no local folder; name one, and copy to gs:// later
    """
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise ValueError(f"{name}={text!r}: is no path; name a folder")
    if scheme := _SCHEME.match(text):
        remedy = f"name one, and copy to {scheme[1]}:// later"
        if scheme[1].lower() == "file":
            remedy = f"name one, without {scheme[0]}"
        raise ValueError(f"{name}={text}: is no local folder; {remedy}")
    try:
        return pathlib.Path(text).expanduser().absolute()
    except (OSError, RuntimeError) as error:  # unknown user, or no current directory
        raise ValueError(f"{name}={text}: cannot be found ({error}); name another") from error


def check_folder(path: pathlib.Path, name: str) -> None:
    """Rejects a path that is a file or lies below a file.

    Args:
      path: absolute.
      name: the argument's name, for the error.

    Raises:
      ValueError: the path cannot be a folder.
    """
    try:
        for part in (path, *path.parents):
            if part.exists():
                if not part.is_dir():
                    raise ValueError(f"{name}={path}: {part} is a file; name another folder")
                return
    except OSError as error:
        _refuse(path, name, error)


def make(path: pathlib.Path, name: str) -> None:
    """Creates a directory for writing.

    Args:
      path: absolute; may exist.
      name: the argument's name, for the error.

    Raises:
      ValueError: it cannot be created or written, permanently. Temporary errors, such as a full
        disk, are left to the write.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        _refuse(path, name, error)


def _refuse(path: pathlib.Path, name: str, error: OSError) -> None:
    if error.errno in _MISTAKES:
        raise ValueError(
            f"{name}={path}: cannot be written ({error.strerror}); name another folder"
        ) from error
