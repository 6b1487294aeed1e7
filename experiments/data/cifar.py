"""CIFAR-10 and CIFAR-100 from their official binary archives.

The archive is converted to an array_record data set of tensorflow-datasets, with the name and
version used by tensorflow-datasets, and read like any other.
"""

import contextlib
import importlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.common.errors import UsageError
from experiments.data import prepared
from experiments.data.archive import Archive, fetch, members
from experiments.data.arrays import Arrays, Images, Labels
from experiments.data.progress import progress

_VERSION = "3.0.2"
_SHAPE = (32, 32, 3)
_PIXELS = 32 * 32 * 3


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets.

    Attributes:
        archive: Its archive.
        label_bytes: Bytes before the pixels of a record; the last of them is the label.
        num_classes: The number of labels.
        train: The archive's members with train images, in order, without ``.bin``.
        records: The number of records of each of these.
        test: The member with test images.
        test_records: Its number of records.
        names: The member with the class names, one per line.
    """

    archive: Archive
    label_bytes: int
    num_classes: int
    train: tuple[str, ...]
    records: int
    test: str
    test_records: int
    names: str


CIFAR = {
    "cifar10": Cifar(
        Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
        ),
        label_bytes=1,
        num_classes=10,
        train=tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)),
        records=10_000,
        test="cifar-10-batches-bin/test_batch.bin",
        test_records=10_000,
        names="cifar-10-batches-bin/batches.meta.txt",
    ),
    "cifar100": Cifar(
        Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
        ),
        label_bytes=2,
        num_classes=100,
        train=("cifar-100-binary/train.bin",),
        records=50_000,
        test="cifar-100-binary/test.bin",
        test_records=10_000,
        names="cifar-100-binary/fine_label_names.txt",
    ),
}


def read(name: str, data_dir: str | None, *, cifar: Cifar | None = None) -> Arrays:
    """Reads ``cifar10`` or ``cifar100``; prepares it first if necessary.

    Args:
        name: The data set.
        data_dir: The folder with the prepared data set or the archive (also in ``downloads/``);
            missing files are written there.
        cifar: Replaces the official data set in tests.

    Raises:
        UsageError: The data can be neither found nor downloaded, or are damaged.
    """
    flag = f"--dataset={name}"
    root = prepared.default_dir(data_dir)
    if prepared.find(name, root) is None:
        cifar = cifar or CIFAR[name]
        path = fetch(cifar.archive, root, flag)
        splits, class_names = _parse(cifar, path, flag)
        try:
            _prepare(name, root, splits, class_names)
        except OSError as error:
            raise UsageError(
                f"--data_dir={root}: {name} cannot be prepared "
                f"there ({error.strerror or type(error).__name__}); "
                "name a writable folder with 500 MB to spare"
            ) from error
    return prepared.read(name, str(root), flag)


def _parse(
    cifar: Cifar, path: Path, flag: str
) -> tuple[dict[str, tuple[Images, Labels]], list[str]]:
    record = cifar.label_bytes + _PIXELS
    sizes: dict[str, int | None] = dict.fromkeys(cifar.train, cifar.records * record)
    sizes |= {cifar.test: cifar.test_records * record, cifar.names: None}
    contents = members(path, sizes, flag)
    class_names = contents[cifar.names].decode("ascii", errors="replace").split()
    splits = {}
    for split, files in (("train", cifar.train), ("test", (cifar.test,))):
        raw = np.frombuffer(b"".join(contents.pop(file) for file in files), np.uint8)
        raw = raw.reshape(-1, record)
        labels = raw[:, cifar.label_bytes - 1].astype(np.int32)
        images = raw[:, cifar.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        if labels.max() >= cifar.num_classes or len(class_names) != cifar.num_classes:
            raise UsageError(
                f"{flag}: {path} has label {labels.max()} and {len(class_names)} class names "
                f"where {cifar.num_classes} classes are expected; replace the file"
            )
        splits[split] = images, labels
    return splits, class_names


def _prepare(
    name: str, root: Path, splits: dict[str, tuple[Images, Labels]], class_names: list[str]
) -> None:
    """Writes the data set in the format of tfds, with a builder that needs no TensorFlow."""
    tfds: Any = importlib.import_module("tensorflow_datasets")

    def examples(images: Images, labels: Labels, split: str) -> Iterator[tuple[str, Any]]:
        with progress(f"preparing {name}, {split}", len(labels)) as advance:
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG")
                png.seek(0)
                yield f"{split}_{i:05d}", {"image": png, "label": int(label)}
                advance(1)

    def info(builder: Any) -> Any:
        features = {
            "image": tfds.features.Image(shape=_SHAPE),
            "label": tfds.features.ClassLabel(names=class_names),
        }
        return tfds.core.DatasetInfo(
            builder=builder,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def split_generators(builder: Any, download_manager: Any) -> dict[str, Any]:
        return {split: examples(*data, split) for split, data in splits.items()}

    body = {
        "__doc__": f"{name} from its binary archive.",
        "__module__": __name__,
        "name": name,
        "VERSION": tfds.core.Version(_VERSION),
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": examples,
    }
    # tfds registers classes by name, and its own class has this name.
    with tfds.core.registered.skip_registration():
        base = tfds.core.GeneratorBasedBuilder
        builder = type(base)(name.capitalize(), (base,), body)(
            data_dir=root, file_format="array_record"
        )
    tfds.disable_progress_bar()
    # tfds prints to stdout, which is reserved for the program.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
