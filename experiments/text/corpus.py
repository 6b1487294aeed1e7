"""Text as numbers: bytes that occur, a train part and a held-out tail."""

from __future__ import annotations

import ast
import hashlib
import pathlib
import sysconfig
import warnings
from typing import NamedTuple

import numpy as np

from experiments.common.errors import UsageError
from experiments.common.memory import memory

# Modules that every supported Python has in its standard library, in this order.
MODULES = (
    *("argparse", "ast", "bdb", "calendar", "cmd", "code", "codecs", "configparser", "contextlib"),
    *("csv", "difflib", "dis", "doctest", "enum", "fileinput", "fractions", "ftplib", "functools"),
    *("gzip", "heapq", "imaplib", "inspect", "ipaddress", "locale", "mailbox", "mimetypes"),
    *("optparse", "os", "pdb", "pickle", "pickletools", "pkgutil", "platform", "poplib", "pydoc"),
    *("queue", "random", "shelve", "shutil", "site", "smtplib", "socket", "socketserver", "ssl"),
    *("statistics", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit"),
    *("tokenize", "traceback", "typing", "uuid", "wave", "weakref"),
)


class Text(NamedTuple):
    """A text, each byte as its place among those that occur.

    Attributes:
      name: where it comes from.
      vocabulary: the different bytes, in rising order; at most 256.
      train: uint8 [n].
      validation: uint8 [m], what follows in the text.
      sha256: of the whole text.
    """

    name: str
    vocabulary: bytes
    train: np.ndarray
    validation: np.ndarray
    sha256: str


def load(path: str | None, validation_fraction: float, context: int) -> Text:
    """The text of a file, or of the standard library's documentation.

    Args:
      path: a file of any bytes; None takes `documentation`.
      validation_fraction: share of the bytes, at the end, that is held out; in (0, 1).
      context: bytes that a sequence has; both parts are longer.

    Raises:
      UsageError: the file cannot be read, or is too short.
    """
    name = "the standard library's documentation" if path is None else path
    content = documentation() if path is None else _read(path)
    held = int(len(content) * validation_fraction)
    if min(held, len(content) - held) <= context:
        raise UsageError(
            f"--context={context}: {name} has {len(content) - held:,} bytes for training and "
            f"{held:,} held out, and both must be more than a sequence; choose less, or a longer "
            "--text"
        )
    numbers = np.frombuffer(content, np.uint8)
    vocabulary = np.flatnonzero(np.bincount(numbers, minlength=256))
    places = np.zeros(256, np.uint8)
    places[vocabulary] = np.arange(len(vocabulary))
    train, validation = np.split(places[numbers], [len(content) - held])
    digest = hashlib.sha256(content).hexdigest()
    return Text(name, bytes(vocabulary.tolist()), train, validation, digest)


def documentation() -> bytes:
    """The docstrings of `MODULES`, read from their sources: one text for each version of Python.

    Raises:
      UsageError: this Python has come without its sources.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    parts = []
    for module in MODULES:
        path = root / f"{module}.py"
        path = path if path.is_file() else root / module / "__init__.py"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the sources: escapes that are none
                tree = ast.parse(path.read_bytes())
        except OSError as error:
            raise UsageError(
                f"--text: is not given, and the source of {module}, whose documentation would be "
                f"the text, cannot be read ({error.strerror}); name a file"
            ) from error
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                parts.append(ast.get_docstring(node) or "")
    return "\n\n".join(part for part in parts if part).encode()


def batch(
    tokens: np.ndarray, context: int, batch_size: int, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences from random places, and what follows each of their bytes.

    Args:
      tokens: [n], n > context.
      context: bytes of a sequence.
      batch_size: sequences.
      seed, step: what the places depend on, and nothing else.

    Returns:
      Inputs and labels, int32 [batch_size, context] each.
    """
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - context, batch_size)
    return _cut(tokens, starts, context)


def windows(tokens: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """All sequences side by side, and what follows each of their bytes.

    Args:
      tokens: [n], n > context.
      context: bytes of a sequence; what is left over at the end is left out.

    Returns:
      Inputs and labels, int32 [(n - 1) // context, context] each.
    """
    return _cut(tokens, np.arange((len(tokens) - 1) // context) * context, context)


def _cut(tokens: np.ndarray, starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    cut = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int32)
    return cut[:, :-1], cut[:, 1:]


def _read(path: str) -> bytes:
    file = pathlib.Path(path)
    try:
        file = file.expanduser()
        if not file.is_file():
            reason = "it is no file" if file.exists() else "there is no such file"
            raise UsageError(f"--text={path}: {reason}; name a file of text")
        # Sequences are gathered from the text and from its numbers, both in memory.
        if (size := file.stat().st_size) > memory() // 4:
            raise UsageError(
                f"--text={path}: has {size / 1e9:,.0f} GB, more than a quarter of this machine's "
                "memory; give a part of it"
            )
        return file.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--text={path}: cannot be read ({reason}); name another") from error
