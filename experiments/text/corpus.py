"""Text as token numbers, one per distinct byte, with a training part and a held-out tail."""

from __future__ import annotations

import ast
import hashlib
import pathlib
import sysconfig
import warnings
from typing import Any, NamedTuple, Self

import numpy as np

from experiments.common.errors import UsageError
from experiments.common.memory import memory

# The text that is always available.
DOCUMENTATION = "python_docs"
# Modules in the standard library of every supported Python, in the order of the text.
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
    """A text as indices into the vocabulary of its bytes.

    Attributes:
      name: the name it was loaded by.
      vocabulary: the distinct bytes, in ascending order; at most 256.
      train: uint8 [n].
      validation: uint8 [m], the rest of the text.
      sha256: hash of the whole text.
    """

    name: str
    vocabulary: bytes
    train: np.ndarray
    validation: np.ndarray
    sha256: str


def load(dataset: str, validation_size: int, context: int) -> Text:
    """The text of a file, or of the standard library's documentation.

    Args:
      dataset: "python_docs", for `documentation`, or "file:PATH" with any bytes.
      validation_size: number of bytes held out at the end; 0: a tenth.
      context: bytes of a sequence; both parts must be longer.

    Raises:
      UsageError: the text is unknown, cannot be read, or is too short.
    """
    kind, _, path = dataset.partition(":")
    if dataset == DOCUMENTATION:
        content = documentation()
    elif kind == "file" and path:
        content = _read(path)
    else:
        raise UsageError(
            f"--dataset={dataset}: must be {DOCUMENTATION} or file:PATH; choose one of these"
        )
    held = validation_size or len(content) // 10
    if held >= len(content):
        raise UsageError(
            f"--validation_size={held}: {dataset} has {len(content):,} bytes in all; choose fewer"
        )
    if min(held, len(content) - held) <= context:
        raise UsageError(
            f"--context={context}: {dataset} has {len(content) - held:,} bytes for training and "
            f"{held:,} held out, and both must be more than a sequence; choose less, or a longer "
            "text"
        )
    numbers = np.frombuffer(content, np.uint8)
    vocabulary = np.flatnonzero(np.bincount(numbers, minlength=256))
    places = np.zeros(256, np.uint8)
    places[vocabulary] = np.arange(len(vocabulary))
    train, validation = np.split(places[numbers], [len(content) - held])
    digest = hashlib.sha256(content).hexdigest()
    return Text(dataset, bytes(vocabulary.tolist()), train, validation, digest)


def documentation() -> bytes:
    """The docstrings of `MODULES`, read from their sources; depends on the version of Python.

    Raises:
      UsageError: the sources are not installed.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    parts = []
    for module in MODULES:
        path = root / f"{module}.py"
        path = path if path.is_file() else root / module / "__init__.py"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # for invalid escapes in the sources
                tree = ast.parse(path.read_bytes())
        except OSError as error:
            raise UsageError(
                f"--dataset={DOCUMENTATION}: the source of {module} cannot be read "
                f"({error.strerror}); give file:PATH"
            ) from error
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                parts.append(ast.get_docstring(node) or "")
    return "\n\n".join(part for part in parts if part).encode()


class Sequences:
    """An endless iterator of mini-batches: sequences at random positions, and their next bytes.

    The positions depend only on the seed and the number of the mini-batch.

    Args:
      text: the text, of which the train part is used.
      context: bytes of a sequence.
      batch_size: sequences of a mini-batch.
      seed: seed of the positions.

    Example:
      >>> text = Text("alphabet", b"abc", np.arange(3, dtype=np.uint8), np.zeros(0, np.uint8), "")
      >>> [x.tolist() for x in next(Sequences(text, context=2, batch_size=1, seed=0))]
      [[[0, 1]], [[1, 2]]]
    """

    def __init__(self, text: Text, context: int, batch_size: int, seed: int) -> None:
        self._tokens, self._context = text.train, context
        self._batch_size, self._seed = batch_size, seed
        self._sha256, self._position = text.sha256, 0

    @property
    def steps_per_epoch(self) -> float:
        """Number of mini-batches with as many bytes as the text."""
        return len(self._tokens) / (self._batch_size * self._context)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, int32 [batch_size, context] each."""
        random = np.random.default_rng((self._seed, self._position))
        self._position += 1
        starts = random.integers(0, len(self._tokens) - self._context, self._batch_size)
        return _cut(self._tokens, starts, self._context)

    def get_state(self) -> dict[str, Any]:
        """The state before the next mini-batch; see `set_state`."""
        return {"position": self._position, "text_sha256": self._sha256}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from ``state``.

        Raises:
          UsageError: the state is from another text.
        """
        if state.get("text_sha256") != self._sha256:
            raise UsageError(
                "--dataset: the text is not the one that the run was begun with; put that back, or "
                "add --overwrite"
            )
        self._position = state["position"]


def windows(tokens: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """All consecutive sequences, and the next byte of each of their bytes.

    Args:
      tokens: [n], n > context.
      context: bytes of a sequence; the remainder is dropped.

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
            raise UsageError(f"--dataset=file:{path}: {reason}; name a file of text")
        # Sequences are gathered from the text and its indices, both in memory.
        if (size := file.stat().st_size) > memory() // 4:
            raise UsageError(
                f"--dataset=file:{path}: has {size / 1e9:,.0f} GB, more than a quarter of this "
                "machine's memory; give a part of it"
            )
        return file.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"--dataset=file:{path}: cannot be read ({reason}); name another"
        ) from error
