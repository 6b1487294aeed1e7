"""Data sets prepared by tensorflow-datasets, read without TensorFlow."""

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.errors import UsageError
from experiments.data import cache
from experiments.data.arrays import Arrays
from experiments.data.images import decode_all

_NAME = re.compile(r"(?P<path>\w+(/[\w.\-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")
_INFO, _FEATURES = "dataset_info.json", "features.json"
_LARGEST = 1 << 24  # bytes of either file
_MOST_CLASSES = 1 << 20
# tfds imports the modules named by a data set's features; only its own are allowed.
_OWN = "tensorflow_datasets.core.features."


def default_dir(data_dir: str | None) -> Path:
    """`data_dir`, else ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``, as tfds itself does."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def find(name: str, root: Path) -> Path | None:
    """The folder of the data set `name` under `root`, in its newest version, if there is one.

    Args:
        name: ``name`` or ``name/config``, optionally followed by ``:1.2.3``.
        root: The data_dir of tfds.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    versions = [
        path.parent
        for path in (root / match["path"]).glob(f"*/{_INFO}")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
        and match["version"] in (None, path.parent.name)
    ]
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))), default=None)


def read(name: str, data_dir: str | None, flag: str) -> Arrays:
    """Reads the prepared data set `name`: splits train and test, features image and label.

    Args:
        name: See `find`.
        data_dir: See `default_dir`.
        flag: The argument that an error names.

    Raises:
        UsageError: It is missing, not stored as array_record, or not for image classification.
    """
    root = default_dir(data_dir)
    folder = find(name, root)
    if folder is None:
        raise UsageError(
            f"{flag}: no prepared data set {name!r} (NAME, NAME/CONFIG or NAME:1.2.3) lies in "
            f"--data_dir={root}; name the folder that has it, or prepare it there with "
            "tensorflow-datasets and file_format='array_record'"
        )
    info = _json(folder / _INFO, flag)
    stored = str(info.get("fileFormat", "tfrecord"))
    if stored != "array_record":
        raise UsageError(
            f"{flag}: {folder} is stored as {stored}, which only TensorFlow reads; prepare it "
            "with file_format='array_record', or name another --data_dir"
        )
    # The cache's key only needs the list of files, so that a second run does not import tfds.
    entry = cache.key("tfds", folder, (str(p) for p in folder.iterdir() if p.is_file()))
    return cache.cached(entry, lambda: _decode(folder, flag))


def _decode(folder: Path, flag: str) -> Arrays:
    _trust(folder, flag)
    tfds: Any = importlib.import_module("tensorflow_datasets")
    # For damaged files tfds raises errors of any type.
    damaged = f"{flag}: {folder} cannot be read (%s); prepare the data set anew"
    try:
        builder = tfds.builder_from_directory(folder)
        features, infos = builder.info.features, dict(builder.info.splits)
        counts = {split: int(info.num_examples) for split, info in infos.items()}
        size = sum(path.stat().st_size for path in folder.iterdir())
        if any(not 0 <= count <= size for count in counts.values()):
            raise ValueError(f"it has more images than its files have bytes, {size}")
    except Exception as error:
        raise UsageError(damaged % " ".join(str(error).split())) from error
    kinds = {name: type(feature) for name, feature in dict(features).items()}
    if kinds | {"image": tfds.features.Image, "label": tfds.features.ClassLabel} != kinds:
        has = ", ".join(f"{name} ({kind.__name__})" for name, kind in sorted(kinds.items()))
        raise UsageError(
            f"{flag}: needs the features image (Image) and label (ClassLabel), but {folder} "
            f"has {has}; choose an image-classification data set"
        )
    if not 1 <= (features["label"].num_classes or 0) <= _MOST_CLASSES:
        raise UsageError(damaged % f"it has {features['label'].num_classes} classes")
    for split in ("train", "test"):
        if not counts.get(split):
            raise UsageError(
                f"{flag}: needs the splits train and test, but {folder} has "
                f"{', '.join(counts) or 'none'}; choose a data set that has both"
            )
    # Images stay encoded here, since the thread pool decodes them faster than tfds.
    skip = {"image": tfds.decode.SkipDecoding()}
    try:
        train = builder.as_data_source(split="train", decoders=skip)
        test = builder.as_data_source(split="test", decoders=skip)
        n, m = len(train), len(test)
    except Exception as error:
        raise UsageError(damaged % " ".join(str(error).split())) from error
    labels = np.empty(n + m, np.int32)

    def encoded(i: int) -> bytes:
        try:
            example = train[i] if i < n else test[i - n]
            labels[i] = example["label"]
            return bytes(example["image"])
        # The reader's C++ code raises many types of errors for damaged files.
        except Exception as error:
            raise UsageError(
                f"{flag}: {describe(i)} cannot be read ({' '.join(str(error).split())}); "
                "prepare the data set anew"
            ) from error

    def describe(i: int) -> str:
        return f"image {i} of train" if i < n else f"image {i - n} of test"

    images = decode_all(n + m, encoded, describe, flag)
    names = tuple(features["label"].names)
    if labels.min() < 0 or labels.max() >= len(names):
        raise UsageError(
            f"{flag}: {folder} has labels outside 0..{len(names) - 1}; "
            "choose a data set whose images are all labelled"
        )
    return Arrays(images[:n], labels[:n], images[n:], labels[n:], names)


def _trust(folder: Path, flag: str) -> None:
    """Raises `UsageError` if the data set refers to modules or files that are not its own."""
    for file, bad in ((_FEATURES, _names_module), (_INFO, _names_path)):
        values: list[Any] = [_json(folder / file, flag)]
        while values:
            value = values.pop()
            if isinstance(value, dict):
                if strange := [key for key, part in value.items() if bad(key, part)]:
                    what = str(value[strange[0]])[:100]
                    raise UsageError(
                        f"{flag}: {folder / file} has {strange[0]}={what!r}, which "
                        "lies outside of the data set; choose another one"
                    )
                values += value.values()
            elif isinstance(value, list):
                values += value


def _names_module(key: str, value: object) -> bool:
    # protobuf accepts both spellings, and tfds an older form with other names.
    if key in ("jsonFeature", "json_feature"):
        return True
    named = key in ("pythonClassName", "python_class_name", "type", "proto_cls")
    return named and isinstance(value, str) and not value.startswith(_OWN)


def _names_path(key: str, value: object) -> bool:
    named = key in ("name", "filepathTemplate", "filepath_template")
    return named and isinstance(value, str) and "/" in value


def _json(path: Path, flag: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST:,} bytes")
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{flag}: {path} cannot be read ({error}); prepare the data set anew"
        ) from error
    return value
