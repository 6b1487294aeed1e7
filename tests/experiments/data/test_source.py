"""Loading by name, and the embedded excerpt."""

import gzip
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.common.errors import UsageError
from experiments.data import cifar, embedded, load
from experiments.data.make_excerpt import excerpt, read_idx
from experiments.data.source import statistics


def test_embedded_excerpt() -> None:
    start = time.perf_counter()
    dataset = load("fashion_mnist_small", None)
    assert time.perf_counter() - start < 5  # A quarter of a second on an idle machine.
    assert dataset.image_shape == (28, 28, 1)
    assert dataset.train_images.dtype == np.uint8
    assert dataset.train_labels.dtype == np.int32
    assert np.bincount(dataset.train_labels).tolist() == [1_000] * 10
    assert np.bincount(dataset.test_labels).tolist() == [200] * 10
    assert dataset.num_classes == 10
    np.testing.assert_allclose(dataset.mean, [0.286], atol=2e-3)
    np.testing.assert_allclose(dataset.std, [0.353], atol=2e-3)
    both = np.concatenate([dataset.train_images, dataset.test_images])
    assert len({image.tobytes() for image in both}) > 11_900


def test_embedded_excerpt_carries_its_licence() -> None:
    folder = Path(embedded.__file__).parent / "fashion_mnist_small"
    assert "2017 Zalando SE" in (folder / "LICENSE").read_text()
    assert (folder / "excerpt.npz.xz").stat().st_size < 8e6


def test_validation_size_reaches_the_split() -> None:
    dataset = load("fashion_mnist_small", None, validation_size=500, train_size=100, seed=3)
    assert np.bincount(dataset.test_labels).tolist() == [50] * 10
    assert np.bincount(dataset.train_labels).tolist() == [10] * 10
    expected = statistics(dataset.train_images)
    np.testing.assert_array_equal(dataset.mean, expected[0])


@pytest.mark.parametrize("name", ["", "mnist", "tfds:", "folder:", "CIFAR10", "cifar10:x"])
def test_unknown_name_lists_the_allowed(name: str) -> None:
    with pytest.raises(UsageError) as error:
        load(name, None)
    message = str(error.value)
    assert message.startswith(f"--dataset={name}: ")
    assert "\n" not in message
    for form in ("fashion_mnist_small", "cifar10", "cifar100", "tfds:NAME", "folder:PATH"):
        assert form in message


def test_cifar_has_the_known_statistics(fake_cifar: Callable[[str], Any], tmp_path: Path) -> None:
    fake = fake_cifar("cifar10")
    fake.write(tmp_path)
    cifar.read("cifar10", str(tmp_path), cifar=fake.cifar)
    dataset = load("cifar10", str(tmp_path))
    np.testing.assert_array_equal(dataset.mean, np.array([0.4914, 0.4822, 0.4465], np.float32))
    np.testing.assert_array_equal(dataset.std, np.array([0.2023, 0.1994, 0.2010], np.float32))


def test_statistics() -> None:
    images = np.random.default_rng(0).integers(0, 256, (90, 30, 40, 3), dtype=np.uint8)
    images[..., 1] = 200
    images[:40, ..., 2] = 255
    mean, std = statistics(images)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std[[0, 2]], (images / 255).std(axis=(0, 1, 2))[[0, 2]], rtol=1e-6)
    assert std[1] == np.float32(1 / 255)


def test_import_leaves_tfds_alone() -> None:
    program = (
        "import sys, experiments.data\n"
        "assert not {'tensorflow_datasets', 'tensorflow'} & set(sys.modules)"
    )
    root = Path(embedded.__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


def test_make_excerpt(tmp_path: Path) -> None:
    labels = np.array([1, 0, 0, 1, 1, 0], np.uint8)
    images = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
    path = tmp_path / "images.gz"
    header = b"\0\0\x08\x03" + np.array([6, 2, 2], ">u4").tobytes()
    path.write_bytes(gzip.compress(header + images.tobytes()))
    np.testing.assert_array_equal(read_idx(path), images)
    chosen, chosen_labels = excerpt(images, labels, 2)
    np.testing.assert_array_equal(chosen, images[[0, 1, 2, 3]])
    assert chosen_labels.tolist() == [1, 0, 0, 1]

    path.write_bytes(gzip.compress(header + images.tobytes()[:-1]))
    with pytest.raises(UsageError, match="no IDX file"):
        read_idx(path)
    path.write_bytes(b"plain")
    with pytest.raises(UsageError, match=r"--source=.*cannot be read"):
        read_idx(path)
