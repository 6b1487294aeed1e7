"""Data sets by name."""

from dataclasses import dataclass

import numpy as np

from experiments.common.errors import UsageError
from experiments.data import cifar, embedded, folder, prepared
from experiments.data.arrays import Arrays, Channels, Images, Labels
from experiments.data.split import split

# The values common in the literature, so that runs are comparable.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """An image-classification data set in memory.

    Attributes:
        name: The name it was loaded by.
        train_images: uint8 [N, H, W, C].
        train_labels: int32 [N].
        test_images: uint8 [M, H, W, C]; the validation images if requested.
        test_labels: int32 [M].
        class_names: The name of each label, in label order.
        mean: Per channel, as a fraction of the pixel range, float32 [C].
        std: Likewise.
    """

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    class_names: tuple[str, ...]
    mean: Channels
    std: Channels

    @property
    def num_classes(self) -> int:
        """The number of labels."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels


def load(
    name: str,
    data_dir: str | None,
    *,
    validation_size: int = 0,
    train_size: int = 0,
    seed: int = 0,
) -> Dataset:
    """Loads a data set into memory.

    Args:
        name: ``fashion_mnist_small`` (comes with the package), ``cifar10``, ``cifar100``,
            ``tfds:NAME`` (prepared by tensorflow-datasets) or ``folder:PATH``
            (train/<class>/* and test/<class>/*).
        data_dir: The folder of tensorflow-datasets and of CIFAR's archives; None means
            ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.
        validation_size: The number of train images to hold out. They replace the test split.
        train_size: The number of remaining train images to keep; 0 keeps all.
        seed: Determines the images held out and kept, class by class.

    Returns:
        The data set; unless it is CIFAR, `mean` and `std` are those of the returned train images.

    Raises:
        UsageError: The data set cannot be loaded, or a size is invalid for it.

    >>> dataset = load("fashion_mnist_small", None, validation_size=1_000)
    >>> dataset.train_images.shape, dataset.test_images.shape, dataset.num_classes
    ((9000, 28, 28, 1), (1000, 28, 28, 1), 10)
    """
    arrays = split(
        _read(name, data_dir), validation_size=validation_size, train_size=train_size, seed=seed
    )
    if name in _STATISTICS:
        mean, std = (np.array(values, np.float32) for values in _STATISTICS[name])
    else:
        mean, std = statistics(arrays.train_images)
    return Dataset(name, *arrays, mean=mean, std=std)


def _read(name: str, data_dir: str | None) -> Arrays:
    kind, _, argument = name.partition(":")
    if name == "fashion_mnist_small":
        return embedded.read()
    if name in cifar.CIFAR:
        return cifar.read(name, data_dir)
    if kind == "tfds" and argument:
        return prepared.read(argument, data_dir, f"--dataset={name}")
    if kind == "folder" and argument:
        return folder.read(argument)
    raise UsageError(
        f"--dataset={name}: must be fashion_mnist_small, cifar10, cifar100, tfds:NAME or "
        "folder:PATH; choose one of these"
    )


def statistics(images: Images) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel, as fractions of the pixel range, [C] each."""
    channels = images.shape[-1]
    rows = images.reshape(len(images), -1)
    # Integer sums are exact, and chunks keep the wider copies small. 255 squared fits in uint16.
    total = rows.sum(axis=0, dtype=np.int64)
    squares = np.zeros_like(total)
    size = max(1, (1 << 21) // rows.shape[1])
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size].astype(np.uint16)
        squares += (chunk * chunk).sum(axis=0, dtype=np.int64)
    count = images.size // channels
    mean = total.reshape(-1, channels).sum(axis=0) / count
    variance = np.maximum(squares.reshape(-1, channels).sum(axis=0) / count - mean**2, 0)
    # A constant channel is only shifted; its deviation is replaced by one grey level.
    std = np.maximum(np.sqrt(variance), 1)
    return (mean / 255).astype(np.float32), (std / 255).astype(np.float32)
