"""Images in folders: train/<class>/* and test/<class>/*."""

import os
from pathlib import Path

import numpy as np

from experiments.common.errors import UsageError
from experiments.data import cache
from experiments.data.arrays import Arrays
from experiments.data.images import LARGEST, decode_all

_SUFFIXES = (".png", ".jpg", ".jpeg")
_LAYOUT = "the folder must hold train/<class>/* and test/<class>/* as PNG or JPEG"

# Strings, since 60,000 Path objects take seconds.
Files = list[tuple[str, int]]


def read(path: str) -> Arrays:
    """Reads the folder `path`; the classes are the sorted names of the folders in train/.

    Files with other suffixes than .png, .jpg and .jpeg, and hidden ones, are passed over.

    Raises:
        UsageError: The layout is wrong, an image is broken, or the sizes differ.
    """
    flag = f"--dataset=folder:{path}"
    root = Path(path).expanduser()
    class_names, train, test = _scan(root, flag)
    files = train + test

    def decode() -> Arrays:
        images = decode_all(
            len(files),
            read=lambda i: _bytes(files[i][0], flag),
            describe=lambda i: files[i][0],
            flag=flag,
        )
        labels = np.array([label for _, label in files], np.int32)
        n = len(train)
        return Arrays(images[:n], labels[:n], images[n:], labels[n:], class_names)

    return cache.cached(cache.key("folder", root, (file for file, _ in files)), decode)


def _bytes(path: str, flag: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UsageError(f"{flag}: {path} cannot be read ({error.strerror})") from error
    if len(content) > LARGEST:
        raise UsageError(f"{flag}: {path} has more than {LARGEST:,} bytes; replace or delete it")
    return content


def _scan(root: Path, flag: str) -> tuple[tuple[str, ...], Files, Files]:
    if not root.is_dir():
        raise UsageError(f"{flag}: there is no such folder; {_LAYOUT}")
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise UsageError(f"{flag}: {root / split} is missing; {_LAYOUT}")
    class_names = _folders(root / "train")
    if not class_names:
        raise UsageError(f"{flag}: {root / 'train'} holds no class folder; {_LAYOUT}")
    tested = _folders(root / "test")
    if not tested:
        raise UsageError(f"{flag}: {root / 'test'} holds no class folder; {_LAYOUT}")
    if unknown := sorted(set(tested) - set(class_names)):
        raise UsageError(
            f"{flag}: {root / 'test' / unknown[0]} is a class that train/ does not have "
            f"(it has {', '.join(class_names[:10])}{', ...' if len(class_names) > 10 else ''}); "
            "add or rename the folder"
        )
    label = {name: i for i, name in enumerate(class_names)}
    train = [(f, label[name]) for name in class_names for f in _files(root / "train" / name, flag)]
    test = [(f, label[name]) for name in tested for f in _files(root / "test" / name, flag)]
    return tuple(class_names), train, test


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(path: Path, flag: str) -> list[str]:
    with os.scandir(path) as entries:
        files = sorted(
            entry.path
            for entry in entries
            if entry.name.lower().endswith(_SUFFIXES)
            and not entry.name.startswith(".")
            and entry.is_file()
        )
    if not files:
        raise UsageError(
            f"{flag}: the class folder {path} holds no {', '.join(_SUFFIXES)} file; "
            "fill or delete it"
        )
    return files
