"""Mini-batches from arrays in memory."""

from collections.abc import Iterator
from typing import Self, cast

import grain
import numpy as np

from experiments.common.errors import UsageError
from experiments.data.arrays import Images, Labels


class Loader:
    """An endless iterator of shuffled mini-batches ``(images, labels)``.

    Every epoch is a new permutation of the examples, divided into full batches; the remainder is
    dropped. Grain shuffles and batches the *indices*; one gather per batch fetches the images,
    which is faster than fetching them one by one.

    Args:
        images: uint8 [N, H, W, C].
        labels: int32 [N].
        batch_size: The number of examples B of each batch, 1..N.
        seed: Determines the order; not negative.

    Raises:
        UsageError: The batch size or the seed is out of bounds.

    >>> loader = Loader(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10, dtype=np.int32), 4, seed=0)
    >>> loader.steps_per_epoch
    2
    >>> images, labels = next(loader)
    >>> images.shape, labels.shape
    ((4, 8, 8, 1), (4,))
    """

    def __init__(self, images: Images, labels: Labels, batch_size: int, seed: int) -> None:
        if len(images) != len(labels):
            raise ValueError(f"there are {len(images)} images but {len(labels)} labels")
        if not 1 <= batch_size <= len(images):
            raise UsageError(
                f"--batch_size={batch_size}: must lie in 1..{len(images)}, the number of train "
                "images; choose such a size"
            )
        if seed < 0:
            raise UsageError(f"--seed={seed}: must not be negative; choose 0 or more")
        self._images, self._labels = images, labels
        # Indices repeat endlessly, and Grain folds the epoch's number into the seed. They are
        # accessed by position, since the threads of an iterator would cost more than they gain.
        epoch = grain.MapDataset.range(len(images)).seed(seed).shuffle()
        epoch = epoch.batch(batch_size, drop_remainder=True)
        self.steps_per_epoch: int = len(epoch)
        self._indices = epoch.repeat()
        self._identity = {"num_examples": len(images), "batch_size": batch_size, "seed": seed}
        self._position = 0

    def __iter__(self) -> Self:
        """Returns the loader itself: two loops over it share one position."""
        return self

    def __next__(self) -> tuple[Images, Labels]:
        """The next mini-batch: uint8 [B, H, W, C] and int32 [B]."""
        indices = cast(np.ndarray, self._indices[self._position])
        self._position += 1
        return self._images[indices], self._labels[indices]

    def get_state(self) -> dict[str, int]:
        """The state before the next batch, as JSON data; see `set_state`."""
        return {"position": self._position, **self._identity}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from `state`.

        Raises:
            UsageError: `state` is from a loader with another order of batches.
        """
        for name, own in self._identity.items():
            if state.get(name) != own:
                flag = "train_size" if name == "num_examples" else name
                raise UsageError(
                    f"--{flag}: the saved run had {name}={state.get(name)}, this one has {own}; "
                    "resume with the values of the saved run"
                )
        if state["position"] < 0:
            raise ValueError(f"position={state['position']} must not be negative")
        self._position = state["position"]


def evaluation_batches(
    inputs: np.ndarray, labels: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yields ``(inputs, labels, count)`` in order, each example once.

    The last batch is padded with zeros to `batch_size`, so that shapes are constant and nothing is
    compiled twice; only its first `count` examples are real.

    Raises:
        UsageError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise UsageError(f"--batch_size={batch_size}: must be 1 or more; choose such a size")
    return _evaluation_batches(inputs, labels, batch_size)


def _evaluation_batches(
    inputs: np.ndarray, labels: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    for start in range(0, len(inputs), batch_size):
        x, y = inputs[start : start + batch_size], labels[start : start + batch_size]
        count = len(x)
        if count < batch_size:
            missing = batch_size - count
            x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
            y = np.concatenate([y, np.zeros((missing, *y.shape[1:]), y.dtype)])
        yield x, y, count
