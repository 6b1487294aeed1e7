"""Mini-batches."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.common.errors import UsageError
from experiments.data import Loader, evaluation_batches


def numbered(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Image i is filled with i, and has label i."""
    labels = np.arange(count, dtype=np.int32)
    return np.tile(labels.astype(np.uint8).reshape(-1, 1, 1, 1), (1, 2, 3, 1)), labels


def epoch(loader: Loader) -> list[int]:
    return np.concatenate([next(loader)[1] for _ in range(loader.steps_per_epoch)]).tolist()


def test_batches_keep_images_and_labels_together() -> None:
    loader = Loader(*numbered(50), batch_size=8, seed=0)
    for _ in range(20):
        images, labels = next(loader)
        assert images.shape == (8, 2, 3, 1)
        assert images.dtype == np.uint8
        assert labels.shape == (8,)
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(images[:, 0, 0, 0], labels)


def test_every_epoch_is_a_new_permutation() -> None:
    loader = Loader(*numbered(60), batch_size=10, seed=0)
    assert loader.steps_per_epoch == 6
    epochs = [epoch(loader) for _ in range(20)]
    for order in epochs:
        assert sorted(order) == list(range(60))
    assert len({tuple(order) for order in epochs}) == 20
    # An example's place in one epoch says nothing about its place in the next.
    kept = [np.mean(np.array(a) == np.array(b)) for a, b in pairwise(epochs)]
    assert max(kept) < 0.2


def test_remainder_is_dropped_inside_the_epoch() -> None:
    loader = Loader(*numbered(11), batch_size=4, seed=0)
    assert loader.steps_per_epoch == 2
    dropped = set()
    for _ in range(30):
        order = epoch(loader)
        assert len(set(order)) == 8
        dropped |= set(range(11)) - set(order)
    assert dropped == set(range(11))  # Not the same ones every time.


def test_seed_decides_the_order() -> None:
    orders = [epoch(Loader(*numbered(40), batch_size=8, seed=seed)) for seed in (0, 0, 1, 2**40)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


@settings(max_examples=10, deadline=None)
@given(before=st.integers(0, 25), count=st.integers(4, 60))
def test_state_restores_exactly(before: int, count: int) -> None:
    loader = Loader(*numbered(count), batch_size=4, seed=3)
    for _ in range(before):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = [next(loader)[1].tolist() for _ in range(6)]
    other = Loader(*numbered(count), batch_size=4, seed=3)
    next(other)
    other.set_state(state)
    assert [next(other)[1].tolist() for _ in range(6)] == expected
    loader.set_state(state)
    assert [next(loader)[1].tolist() for _ in range(6)] == expected


@pytest.mark.parametrize(
    ("count", "batch_size", "seed", "flag"),
    [(40, 4, 1, "--seed"), (40, 5, 0, "--batch_size"), (41, 4, 0, "--train_size")],
)
def test_state_of_another_run_is_refused(count: int, batch_size: int, seed: int, flag: str) -> None:
    state = Loader(*numbered(40), batch_size=4, seed=0).get_state()
    with pytest.raises(UsageError, match=f"{flag}: the saved run had"):
        Loader(*numbered(count), batch_size=batch_size, seed=seed).set_state(state)


@pytest.mark.parametrize("batch_size", [-1, 0, 11])
def test_batch_size_out_of_bounds(batch_size: int) -> None:
    with pytest.raises(UsageError, match=rf"--batch_size={batch_size}: must lie in 1\.\.10"):
        Loader(*numbered(10), batch_size=batch_size, seed=0)
    assert Loader(*numbered(10), batch_size=10, seed=0).steps_per_epoch == 1


def test_negative_seed() -> None:
    with pytest.raises(UsageError, match="--seed=-1"):
        Loader(*numbered(10), batch_size=2, seed=-1)


def test_unequal_lengths() -> None:
    images, labels = numbered(10)
    with pytest.raises(ValueError, match="10 images but 9 labels"):
        Loader(images, labels[:9], batch_size=2, seed=0)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_evaluation_batches(count: int, batch_size: int) -> None:
    seen = []
    for images, labels, real in evaluation_batches(*numbered(count), batch_size):
        assert images.shape == (batch_size, 2, 3, 1)
        assert images.dtype == np.uint8
        assert labels.shape == (batch_size,)
        assert labels.dtype == np.int32
        assert not images[real:].any()
        assert not labels[real:].any()
        np.testing.assert_array_equal(images[:real, 1, 1, 0], labels[:real])
        seen += labels[:real].tolist()
    assert seen == list(range(count))


def test_evaluation_batch_size_is_checked_at_the_call() -> None:
    with pytest.raises(UsageError, match="--batch_size=0"):
        evaluation_batches(*numbered(4), 0)
