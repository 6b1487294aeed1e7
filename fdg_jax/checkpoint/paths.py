"""Folders that a user names."""

from __future__ import annotations

import os
import pathlib
import re

# As pathlib leaves it, "gs://bucket" is "gs:/bucket"; one letter is a drive.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def local(path: str | os.PathLike[str], name: str) -> pathlib.Path:
    """An absolute path in the local file system, ``~`` expanded.

    Args:
      path: of a folder, which need not exist.
      name: of the argument, for the error.

    Returns:
      The path.

    Raises:
      ValueError: it has a scheme, such as ``gs://``, or the home of a user that there is not.

    Example:
      >>> local("/runs/a", "directory").as_posix()
      '/runs/a'
      >>> local("gs://bucket/a", "directory")
      Traceback (most recent call last):
      ValueError: directory=gs://bucket/a: is no local folder; name one, and copy to gs:// later
    """
    text = os.fspath(path)
    scheme = _SCHEME.match(text)
    if scheme is not None:
        raise ValueError(
            f"{name}={text}: is no local folder; name one, and copy to {scheme[1]}:// later"
        )
    try:
        return pathlib.Path(text).expanduser().absolute()
    except (OSError, RuntimeError) as error:  # no such user, or no folder to be in
        raise ValueError(f"{name}={text}: cannot be found ({error}); name another") from error
