"""Images in folders: train/<class>/* and test/<class>/*."""

import os
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.common.errors import UsageError
from experiments.data import cache
from experiments.data.arrays import Arrays
from experiments.data.images import LARGEST, decode_all

_SUFFIXES = (".png", ".jpg", ".jpeg")
# Images of other formats are rejected, not skipped like text files or thumbnail databases.
_OTHER_IMAGES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".pgm"),
    *(".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
_LAYOUT = "the folder must hold train/<class>/* and test/<class>/* as PNG or JPEG"

# Strings, since creating 60,000 Path objects takes seconds.
Files = list[tuple[str, int]]


def read(path: str) -> Arrays:
    """Reads the folder `path`; the classes are the sorted names of the folders in train/.

    Hidden files are skipped silently; other files that are no images are counted. Class names are
    compared in the Unicode form NFC, since file systems differ in it.

    Raises:
        UsageError: The layout is wrong, an image is broken or of another format, an image is in a
            subfolder of a class or in no class, or the sizes differ.
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
    skipped: list[str] = []
    trained = _folders(root / "train", flag, skipped)
    if not trained:
        raise UsageError(f"{flag}: {root / 'train'} holds no class folder; {_LAYOUT}")
    tested = _folders(root / "test", flag, skipped)
    if not tested:
        raise UsageError(f"{flag}: {root / 'test'} holds no class folder; {_LAYOUT}")
    if unknown := sorted(set(tested) - set(trained)):
        some = f"{', '.join(list(trained)[:10])}{', ...' if len(trained) > 10 else ''}"
        raise UsageError(
            f"{flag}: {tested[unknown[0]]} is a class that train/ does not have (it has {some}); "
            "add or rename the folder"
        )
    label = {name: i for i, name in enumerate(trained)}

    def listed(folders: dict[str, Path]) -> Files:
        of = {name: _files(path, flag, skipped) for name, path in folders.items()}
        return [(file, label[name]) for name, files in of.items() for file in files]

    train, test = listed(trained), listed(tested)
    if skipped:
        print(
            f"{flag}: skipped {len(skipped)} files that are no images, such as {skipped[0]!a}",
            file=sys.stderr,
        )
    return tuple(trained), train, test


def _folders(path: Path, flag: str, skipped: list[str]) -> dict[str, Path]:
    """The class folders by name, sorted."""
    found: dict[str, Path] = {}
    for folder in sorted(p for p in path.iterdir() if not p.name.startswith(".")):
        if not folder.is_dir():
            if folder.name.lower().endswith(_SUFFIXES + _OTHER_IMAGES):
                raise UsageError(f"{flag}: {folder} lies in no class folder; move or delete it")
            skipped.append(str(folder))
            continue
        name = unicodedata.normalize("NFC", folder.name)
        if name in found:
            raise UsageError(f"{flag}: two folders in {path} are named {name}; make them one")
        found[name] = folder
    return dict(sorted(found.items()))


def _files(path: Path, flag: str, skipped: list[str]) -> list[str]:
    files = []
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = entry.name.lower()
            if name.startswith("."):
                continue
            if entry.is_dir():
                if inner := next(_images_in(entry.path), None):
                    raise UsageError(
                        f"{flag}: {inner} lies in a folder inside the class {path}; move the "
                        "images up, or delete them"
                    )
            elif name.endswith(_OTHER_IMAGES):
                raise UsageError(f"{flag}: {entry.path} is no PNG or JPEG; convert or delete it")
            elif name.endswith(_SUFFIXES) and entry.is_file():
                files.append(entry.path)
            else:
                skipped.append(entry.path)
    if not files:
        raise UsageError(
            f"{flag}: the class folder {path} holds no {', '.join(_SUFFIXES)} file; "
            "fill or delete it"
        )
    return files


def _images_in(folder: str) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(_SUFFIXES + _OTHER_IMAGES) and not name.startswith("."):
                yield os.path.join(where, name)
