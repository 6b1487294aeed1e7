"""Validation sets and subsets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.common.errors import UsageError
from experiments.data.arrays import Arrays
from experiments.data.split import balanced, split


def numbered(labels: list[int], classes: int) -> Arrays:
    """Train image i has the value i; the test image has the value 255."""
    values = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    test = np.full((1, 1, 1, 1), 255, np.uint8)
    names = tuple(map(str, range(classes)))
    return Arrays(values, np.array(labels, np.int32), test, np.zeros(1, np.int32), names)


def test_validation_replaces_the_test_split() -> None:
    arrays = numbered([0, 1, 2] * 20, 3)
    result = split(arrays, validation_size=15, train_size=0, seed=1)
    held, rest = result.test_images.ravel().tolist(), result.train_images.ravel().tolist()
    assert sorted(held + rest) == list(range(60))
    assert np.bincount(result.test_labels).tolist() == [5, 5, 5]
    assert [i % 3 for i in held] == result.test_labels.tolist()
    assert [i % 3 for i in rest] == result.train_labels.tolist()


def test_train_size_after_validation() -> None:
    arrays = numbered([0, 1, 2] * 20, 3)
    whole = split(arrays, validation_size=15, train_size=0, seed=1)
    result = split(arrays, validation_size=15, train_size=12, seed=1)
    np.testing.assert_array_equal(result.test_images, whole.test_images)
    assert np.bincount(result.train_labels).tolist() == [4, 4, 4]
    assert set(result.train_images.ravel()) <= set(whole.train_images.ravel())


def test_zero_changes_nothing() -> None:
    arrays = numbered([0, 1], 2)
    assert split(arrays, validation_size=0, train_size=0, seed=0) is arrays


def test_depends_on_the_seed_alone() -> None:
    labels = np.arange(60, dtype=np.int32) % 3
    np.random.seed(0)
    first = balanced(labels, 20, seed=7)
    np.random.seed(1)
    np.testing.assert_array_equal(first, balanced(labels, 20, seed=7))
    assert first.tolist() != balanced(labels, 20, seed=8).tolist()


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_balanced_as_far_as_possible(labels: list[int], share: float, seed: int) -> None:
    size = round(share * len(labels))
    chosen = balanced(np.array(labels, np.int32), size, seed)
    assert len(chosen) == len(set(chosen.tolist())) == size
    assert chosen.tolist() == sorted(chosen.tolist())
    counts = np.bincount(np.array(labels)[chosen], minlength=5)
    # A class that fell behind the largest by more than one had no more to give.
    for label in range(5):
        assert counts[label] >= counts.max() - 1 or counts[label] == labels.count(label)
    if size:
        smaller = balanced(np.array(labels, np.int32), size - 1, seed)
        assert set(smaller.tolist()) < set(chosen.tolist())


@pytest.mark.parametrize(
    ("validation_size", "train_size", "seed", "message"),
    [
        (-1, 0, 0, r"--validation_size=-1: must lie in 0\.\.5"),
        (6, 0, 0, r"--validation_size=6: must lie in 0\.\.5"),
        (0, -1, 0, r"--train_size=-1: must lie in 0\.\.6"),
        (2, 5, 0, r"--train_size=5: must lie in 0\.\.4"),
        (0, 1, -1, r"--seed=-1"),
    ],
)
def test_bounds(validation_size: int, train_size: int, seed: int, message: str) -> None:
    arrays = numbered([0, 1, 2] * 2, 3)
    with pytest.raises(UsageError, match=message):
        split(arrays, validation_size=validation_size, train_size=train_size, seed=seed)
    split(arrays, validation_size=5, train_size=1, seed=0)
