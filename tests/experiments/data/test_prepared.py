"""Data sets prepared by tensorflow-datasets."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.common.errors import UsageError
from experiments.data import load, prepared


def png(pixels: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file


def prepare(
    root: Path,
    images: dict[str, list[np.ndarray]],
    *,
    label: str = "label",
    version: str = "1.0.0",
    channels: int | None = None,
) -> Path:
    """Prepares the data set `shapes` with three classes; image i has label i % 3."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Shapes(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
            name = "shapes"
            VERSION = tfds.core.Version(version)

            def _info(self) -> Any:
                features = {
                    "image": tfds.features.Image(shape=(None, None, channels)),
                    label: tfds.features.ClassLabel(names=["dot", "line", "ring"]),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {split: self._generate_examples(split) for split in images}

            def _generate_examples(self, split: str) -> Iterator[tuple[str, Any]]:
                for i, image in enumerate(images[split]):
                    yield f"{split}{i}", {"image": png(image), label: i % 3}

    tfds.disable_progress_bar()
    Shapes(data_dir=root, file_format="array_record").download_and_prepare()
    return root / "shapes" / version


def random_images(count: int, shape: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


def test_reads_images_labels_and_names(tmp_path: Path, decoded: list[object]) -> None:
    train, test = random_images(7, (5, 6, 3)), random_images(4, (5, 6, 3))
    prepare(tmp_path, {"train": train, "test": test})
    decoded.clear()
    dataset = load("tfds:shapes", str(tmp_path))
    assert dataset.class_names == ("dot", "line", "ring")
    assert dataset.image_shape == (5, 6, 3)
    assert dataset.test_images.shape == (4, 5, 6, 3)
    # Preparing shuffles, so each image is looked up with the label it must have.
    expected = {image.tobytes(): i % 3 for i, image in enumerate(train)}
    found = zip(dataset.train_images, dataset.train_labels, strict=True)
    assert {x.tobytes(): int(y) for x, y in found} == expected

    assert len(decoded) == 12  # The first image is decoded once more, for its size.
    load("tfds:shapes:1.0.0", str(tmp_path))
    assert len(decoded) == 12


def test_grayscale_has_one_channel(tmp_path: Path) -> None:
    images = random_images(3, (4, 4))
    prepare(tmp_path, {"train": images, "test": images}, channels=1)
    dataset = load("tfds:shapes", str(tmp_path))
    assert dataset.image_shape == (4, 4, 1)
    assert {x.tobytes() for x in dataset.train_images} == {x.tobytes() for x in images}


def test_newest_version_unless_named(tmp_path: Path) -> None:
    for version, count in (("2.0.0", 3), ("10.0.0", 4)):
        images = random_images(count, (4, 4, 3))
        prepare(tmp_path, {"train": images, "test": images}, version=version)
    assert len(load("tfds:shapes", str(tmp_path)).train_images) == 4
    assert len(load("tfds:shapes:2.0.0", str(tmp_path)).train_images) == 3
    with pytest.raises(UsageError, match=r"--dataset=tfds:shapes:3.0.0: no prepared data set"):
        load("tfds:shapes:3.0.0", str(tmp_path))


@pytest.mark.parametrize("name", ["absent", "../etc", "/etc", "a/b/c", "a:1"])
def test_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data_dir=.*prepare it there"):
        load(f"tfds:{name}", str(tmp_path))


def test_default_data_dir(tmp_path: Path) -> None:
    images = random_images(3, (4, 4, 3))
    prepare(tmp_path / "tfds", {"train": images, "test": images})
    assert len(load("tfds:shapes", None).train_images) == 3


def test_differing_sizes(tmp_path: Path) -> None:
    images = random_images(2, (4, 4, 3)) + random_images(1, (4, 5, 3))
    prepare(tmp_path, {"train": images, "test": images})
    with pytest.raises(UsageError, match=r"must have one size.*(5x4.*4x4|4x4.*5x4)"):
        load("tfds:shapes", str(tmp_path))


def test_no_test_split(tmp_path: Path) -> None:
    prepare(tmp_path, {"train": random_images(3, (4, 4, 3))})
    with pytest.raises(UsageError, match=r"needs the splits train and test.* has train;"):
        load("tfds:shapes", str(tmp_path))


def test_no_label(tmp_path: Path) -> None:
    images = random_images(3, (4, 4, 3))
    prepare(tmp_path, {"train": images, "test": images}, label="kind")
    with pytest.raises(UsageError, match=r"needs the features image .* has image \(Image\), kind"):
        load("tfds:shapes", str(tmp_path))


def test_other_file_formats_and_damaged_files(tmp_path: Path) -> None:
    images = random_images(3, (4, 4, 3))
    folder = prepare(tmp_path, {"train": images, "test": images})
    info = folder / "dataset_info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"fileFormat": "tfrecord"}))
    with pytest.raises(UsageError, match=r"stored as tfrecord, which only TensorFlow reads"):
        load("tfds:shapes", str(tmp_path))
    info.write_text("{")
    with pytest.raises(UsageError, match=r"dataset_info.json cannot be read"):
        load("tfds:shapes", str(tmp_path))
    info.write_text(json.dumps(content))
    (record,) = folder.glob("*train*")
    record.write_bytes(b"\0" * record.stat().st_size)
    with pytest.raises(UsageError, match="prepare the data set anew"):
        load("tfds:shapes", str(tmp_path))


def test_default_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared.default_dir("/x") == Path("/x")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert prepared.default_dir(None) == Path("~/tensorflow_datasets").expanduser()
