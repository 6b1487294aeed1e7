"""CIFAR from synthetic archives in the official layout."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.common.errors import UsageError
from experiments.data import cifar

Make = Callable[[str], Any]


def same_set(images: np.ndarray, labels: np.ndarray, expected: tuple[Any, Any]) -> bool:
    """Whether these are the expected examples in any order: preparing shuffles them."""
    found = sorted((x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True))
    return found == sorted((x.tobytes(), int(y)) for x, y in zip(*expected, strict=True))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("place", ["", "downloads"])
def test_prepares_the_archive_once(
    name: str, place: str, fake_cifar: Make, tmp_path: Path, decoded: list[object]
) -> None:
    fake = fake_cifar(name)
    archive = fake.write(tmp_path / "data" / place)
    arrays = cifar.read(name, str(tmp_path / "data"), cifar=fake.cifar)
    arrays.check()
    assert same_set(arrays.train_images, arrays.train_labels, fake.train)
    assert same_set(arrays.test_images, arrays.test_labels, fake.test)
    assert arrays.class_names == fake.class_names
    assert (tmp_path / "data" / name / "3.0.2" / "dataset_info.json").is_file()

    archive.unlink()
    assert decoded
    decoded.clear()
    again = cifar.read(name, str(tmp_path / "data"))
    assert not decoded
    np.testing.assert_array_equal(again.train_images, arrays.train_images)
    np.testing.assert_array_equal(again.test_labels, arrays.test_labels)


def test_downloads_and_checks_the_md5(fake_cifar: Make, tmp_path: Path) -> None:
    fake = fake_cifar("cifar10")
    served = fake.write(tmp_path / "web")
    md5 = hashlib.md5(served.read_bytes()).hexdigest()
    archive = dataclasses.replace(fake.cifar.archive, md5=md5)
    good = dataclasses.replace(fake.cifar, archive=archive)
    assert cifar.read("cifar10", str(tmp_path / "data"), cifar=good).train_images.shape[0] == 60
    downloads = tmp_path / "data" / "downloads"
    assert [p.name for p in downloads.iterdir() if p.is_file()] == ["cifar-10-binary.tar.gz"]

    bad = dataclasses.replace(fake.cifar, archive=dataclasses.replace(archive, md5="0" * 32))
    with pytest.raises(UsageError, match=r"--dataset=cifar10: .*downloaded damaged"):
        cifar.read("cifar10", str(tmp_path / "other"), cifar=bad)
    assert not list((tmp_path / "other" / "downloads").iterdir())


def test_official_md5_rejects_another_file(fake_cifar: Make, tmp_path: Path) -> None:
    fake_cifar("cifar10").write(tmp_path)
    with pytest.raises(UsageError, match=r"is damaged \(md5 .*c32a1d4ab5d03f1284b67883e8d87530"):
        cifar.read("cifar10", str(tmp_path))


def test_no_archive_and_no_network(fake_cifar: Make, tmp_path: Path) -> None:
    fake = fake_cifar("cifar100")
    with pytest.raises(UsageError, match=r"put that file into") as error:
        cifar.read("cifar100", str(tmp_path / "data"), cifar=fake.cifar)
    assert "cifar-100-binary.tar.gz" in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_archive(fake_cifar: Make, tmp_path: Path) -> None:
    fake = fake_cifar("cifar10")
    path = fake.write(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match="is damaged"):
        cifar.read("cifar10", str(tmp_path), cifar=fake.cifar)
    path.write_bytes(b"no archive at all")
    with pytest.raises(UsageError, match="is damaged"):
        cifar.read("cifar10", str(tmp_path), cifar=fake.cifar)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, f: m.pop(f.test), r"lacks the member cifar-10-batches-bin/test_batch.bin"),
        (lambda m, f: m.update({f.test: m[f.test][:-1]}), r"has 21510 bytes, expected 21511"),
        (lambda m, f: m.update({f.names: b"x" * 70_000}), r"70000 bytes, expected 65536 at most"),
        (lambda m, f: m.update({f.names: b"just\nthree\nnames"}), r"3 class names where 10"),
        (lambda m, f: m.update({f.test: b"\x0a" + m[f.test][1:]}), r"label 10 and 10 class names"),
    ],
)
def test_wrong_members(
    change: Callable[[dict[str, bytes], Any], object],
    message: str,
    fake_cifar: Make,
    tmp_path: Path,
) -> None:
    fake = fake_cifar("cifar10")
    members = dict(fake.members)
    change(members, fake.cifar)
    fake.write(tmp_path, members)
    with pytest.raises(UsageError, match=message):
        cifar.read("cifar10", str(tmp_path), cifar=fake.cifar)
    assert not (tmp_path / "cifar10").exists()


def test_data_dir_that_cannot_be_written(fake_cifar: Make, tmp_path: Path) -> None:
    fake = fake_cifar("cifar10")
    fake.write(tmp_path)
    (tmp_path / "cifar10").write_text("a file where a folder is needed")
    with pytest.raises(UsageError, match=r"--data_dir=.*cannot be prepared there"):
        cifar.read("cifar10", str(tmp_path), cifar=fake.cifar)


def test_tensorflow_stays_out(fake_cifar: Make, tmp_path: Path) -> None:
    fake = fake_cifar("cifar10")
    fake.write(tmp_path)
    cifar.read("cifar10", str(tmp_path), cifar=fake.cifar)
    assert "tensorflow" not in sys.modules
