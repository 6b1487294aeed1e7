"""Small synthetic data sets."""

import dataclasses
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.data.archive import Archive
from experiments.data.cifar import CIFAR, Cifar


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps every test's cache and default data_dir inside tmp_path."""
    path = tmp_path / "cache"
    monkeypatch.setenv("FDG_CACHE_DIR", str(path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return path


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list with one entry per image opened by Pillow."""
    opened: list[object] = []
    original = Image.open

    def count(fp: io.BytesIO, *args: object, **kwargs: object) -> Image.Image:
        opened.append(fp)
        return original(fp, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", count)
    return opened


def pixels(seed: int, shape: tuple[int, ...] = (8, 10, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Classes ant (3 train, 1 test image) and bee (2 and 2), 10 wide and 8 high, RGB."""
    root = tmp_path / "images"
    for seed, (split, name, count) in enumerate(
        [("train", "bee", 2), ("train", "ant", 3), ("test", "ant", 1), ("test", "bee", 2)]
    ):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(pixels(10 * seed + i)).save(folder / f"{i}.png")
    return root


@dataclasses.dataclass
class FakeCifar:
    """A synthetic archive: the arguments of `cifar.read`, and its expected result."""

    cifar: Cifar
    members: dict[str, bytes]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    class_names: tuple[str, ...]

    def write(self, folder: Path, members: dict[str, bytes] | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.cifar.archive.file
        with tarfile.open(path, "w:gz") as tar:
            for name, content in (self.members if members is None else members).items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path


@pytest.fixture
def fake_cifar(tmp_path: Path) -> Callable[[str], FakeCifar]:
    def make(name: str) -> FakeCifar:
        official = CIFAR[name]
        train_records, test_records = 12, 7
        rng = np.random.default_rng(0)

        def records(count: int) -> tuple[bytes, np.ndarray, np.ndarray]:
            labels = rng.integers(0, official.num_classes, count, dtype=np.uint8)
            images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            # The coarse label of CIFAR-100 must be ignored.
            columns = [np.full((count, 1), 3, np.uint8)] * (official.label_bytes - 1)
            columns += [labels[:, None], images.transpose(0, 3, 1, 2).reshape(count, -1)]
            return np.concatenate(columns, axis=1).tobytes(), images, labels.astype(np.int32)

        class_names = tuple(f"class_{i}" for i in range(official.num_classes))
        members, images, labels = {"elsewhere/../README": b"passed over"}, [], []
        # Last file first: the order inside the archive must not matter.
        for file in reversed(official.train):
            members[file], x, y = records(train_records)
            images.insert(0, x)
            labels.insert(0, y)
        members[official.test], *test = records(test_records)
        members[official.names] = ("\n".join(class_names) + "\n\n").encode()
        url = (tmp_path / "web" / official.archive.file).as_uri()
        cifar = dataclasses.replace(
            official,
            archive=Archive(url, md5=None),
            records=train_records,
            test_records=test_records,
        )
        train = np.concatenate(images), np.concatenate(labels)
        return FakeCifar(cifar, members, train, (test[0], test[1]), class_names)

    return make
