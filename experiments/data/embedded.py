"""The bundled data set: an excerpt of Fashion-MNIST."""

import io
import lzma
from importlib import resources

import numpy as np

from experiments.data.arrays import Arrays

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def read() -> Arrays:
    """10,000 train and 2,000 test images, uint8 28 x 28 x 1, 10 balanced classes."""
    folder = resources.files("experiments.data") / "fashion_mnist_small"
    packed = (folder / "excerpt.npz.xz").read_bytes()
    with np.load(io.BytesIO(lzma.decompress(packed)), allow_pickle=False) as file:
        return Arrays(
            train_images=file["train_images"][..., None],
            train_labels=file["train_labels"].astype(np.int32),
            test_images=file["test_images"][..., None],
            test_labels=file["test_labels"].astype(np.int32),
            class_names=CLASS_NAMES,
        )
