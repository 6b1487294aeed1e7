"""Class-balanced subsets, determined by seed and sizes."""

import numpy as np

from experiments.common.errors import UsageError
from experiments.data.arrays import Arrays, Indices, Labels


def split(arrays: Arrays, *, validation_size: int, train_size: int, seed: int) -> Arrays:
    """Holds out a validation set, then reduces the train set.

    The validation images *replace* the test split, so that hyper-parameters can be chosen without
    the test set.

    Args:
        arrays: The whole data set.
        validation_size: The number of train images to hold out; 0 keeps the test split.
        train_size: The number of the remaining train images to keep; 0 keeps all.
        seed: Determines the images; not negative.

    Raises:
        UsageError: A size is invalid for the number of train images, or the seed is negative.
    """
    count = len(arrays.train_labels)
    if seed < 0:
        raise UsageError(f"--seed={seed}: must not be negative; choose 0 or more")
    if not 0 <= validation_size < count:
        raise UsageError(
            f"--validation_size={validation_size}: must lie in 0..{count - 1}, since the train "
            f"split has {count} images and one must be left; choose such a size"
        )
    if not 0 <= train_size <= count - validation_size:
        raise UsageError(
            f"--train_size={train_size}: must lie in 0..{count - validation_size}, the train "
            "images left besides the validation images; choose such a size, or 0 for all"
        )
    if validation_size:
        held = balanced(arrays.train_labels, validation_size, seed)
        rest = np.setdiff1d(np.arange(count), held)
        arrays = Arrays(
            arrays.train_images[rest],
            arrays.train_labels[rest],
            arrays.train_images[held],
            arrays.train_labels[held],
            arrays.class_names,
        )
    if train_size:
        kept = balanced(arrays.train_labels, train_size, seed)
        arrays = arrays._replace(
            train_images=arrays.train_images[kept], train_labels=arrays.train_labels[kept]
        )
    return arrays


def balanced(labels: Labels, size: int, seed: int) -> Indices:
    """The sorted indices of `size` examples, balanced over the classes as far as possible.

    In every round each class, in random order, contributes one random example, until there are
    `size`; exhausted classes are skipped. So a smaller choice is a subset of a larger one.

    >>> balanced(np.array([0, 0, 1, 1, 1], np.int32), 5, seed=0).tolist()
    [0, 1, 2, 3, 4]
    """
    # `rank` is the random position of an example within its class, from 0.
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    classes = rng.permutation(int(labels.max()) + 1)
    rank = np.empty(len(labels), np.int64)
    for label in classes:
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    dealt = np.lexsort((classes[labels], rank))
    return np.sort(dealt[:size])
