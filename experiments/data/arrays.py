"""The decoded form of every data set."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]
Channels = npt.NDArray[np.float32]


class Arrays(NamedTuple):
    """A whole data set, decoded.

    Attributes:
        train_images: uint8 [N, H, W, C].
        train_labels: int32 [N].
        test_images: uint8 [M, H, W, C].
        test_labels: int32 [M].
        class_names: The name of each label, in label order.
    """

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    class_names: tuple[str, ...]

    def check(self) -> None:
        """Raises ValueError unless shapes, dtypes and labels are consistent."""
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
                raise ValueError(f"{split} images: {images.dtype} {images.shape}")
            if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
                raise ValueError(f"{split} labels: {labels.dtype} {labels.shape}")
            if labels.min() < 0 or labels.max() >= len(self.class_names):
                raise ValueError(f"{split} labels lie outside 0..{len(self.class_names) - 1}")
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"train images are {self.train_images.shape[1:]}, "
                f"test images {self.test_images.shape[1:]}"
            )
