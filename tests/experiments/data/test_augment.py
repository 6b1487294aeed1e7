"""Random crops and flips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import augment, normalise

MEAN = np.zeros(1, np.float32)
STD = np.ones(1, np.float32)
# Operation by operation it is slow; test_jit_gives_the_same ties the two together.
jitted = jax.jit(augment, static_argnames=("padding", "flip"))


def ramp(batch: int, height: int = 6, width: int = 8) -> np.ndarray:
    """Every pixel has a value of its own, none is 0, so that a crop can be located."""
    image = np.arange(1, height * width + 1, dtype=np.uint8).reshape(1, height, width, 1)
    return np.repeat(image, batch, axis=0)


def raw(images: jax.Array) -> np.ndarray:
    return np.rint(np.asarray(images) * 255).astype(np.uint8)


def test_normalise() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
    result = normalise(images, mean, std)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (images / 255 - mean) / std, rtol=1e-5, atol=1e-6)


def test_off_is_normalise() -> None:
    images = ramp(5)
    result = jitted(jax.random.key(0), 0, images, MEAN, STD, padding=0, flip=False)
    np.testing.assert_array_equal(result, normalise(images, MEAN, STD))


def test_crops_are_windows_of_the_padded_image() -> None:
    padding, batch = 2, 400
    images = ramp(batch)
    result = raw(jitted(jax.random.key(1), 3, images, MEAN, STD, padding=padding, flip=True))
    padded = np.pad(images[0, :, :, 0], padding)
    windows = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[top : top + 6, left : left + 8]
            windows[window.tobytes()] = (top, left, False)
            windows[window[:, ::-1].tobytes()] = (top, left, True)
    # A window that is none of these raises KeyError.
    found = [windows[image[..., 0].tobytes()] for image in result]
    assert len(set(found)) == 50  # 25 offsets, mirrored or not: all occur.
    for axis in (0, 1):
        counts = np.bincount([place[axis] for place in found], minlength=5)
        assert counts.min() > 50  # 80 expected.
    assert 160 < sum(place[2] for place in found) < 240


def test_padding_is_black_before_normalising() -> None:
    images = np.full((64, 4, 4, 1), 255, np.uint8)
    mean, std = np.array([0.25], np.float32), np.array([0.5], np.float32)
    result = np.asarray(jitted(jax.random.key(0), 0, images, mean, std, padding=2))
    black, white = np.isclose(result, -0.5), np.isclose(result, 1.5)
    assert (black ^ white).all()
    assert black.any()


def test_flip_alone_mirrors_about_half() -> None:
    images = ramp(1_000)
    result = raw(jitted(jax.random.key(0), 0, images, MEAN, STD, padding=0))
    mirrored = (result == images[:, :, ::-1]).all(axis=(1, 2, 3))
    straight = (result == images).all(axis=(1, 2, 3))
    assert (mirrored ^ straight).all()
    assert 430 < mirrored.sum() < 570


def test_crop_alone_never_mirrors() -> None:
    result = raw(jitted(jax.random.key(0), 0, ramp(200), MEAN, STD, padding=1, flip=False))
    inside = result[:, 1:-1, 1:-1, 0].astype(int)
    assert (np.diff(inside, axis=2) > 0).all()


def test_depends_on_key_and_step() -> None:
    images = ramp(16)
    first = jitted(jax.random.key(0), 5, images, MEAN, STD)
    np.testing.assert_array_equal(first, jitted(jax.random.key(0), 5, images, MEAN, STD))
    assert (first != jitted(jax.random.key(0), 6, images, MEAN, STD)).any()
    assert (first != jitted(jax.random.key(1), 5, images, MEAN, STD)).any()


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (2, True)])
def test_jit_gives_the_same(padding: int, flip: bool) -> None:
    images, key = ramp(16), jax.random.key(0)
    result = jitted(key, jnp.int32(5), images, MEAN, STD, padding=padding, flip=flip)
    assert result.dtype == jnp.float32
    assert result.shape == images.shape
    eager = augment(key, 5, images, MEAN, STD, padding=padding, flip=flip)
    np.testing.assert_allclose(result, eager, rtol=1e-6)


def test_x64_draws_the_same() -> None:
    images, key = ramp(16), jax.random.key(0)
    results = []
    for enabled in (False, True):
        with jax.enable_x64(enabled):
            results.append(raw(jitted(key, 0, images, MEAN, STD)))
    np.testing.assert_array_equal(*results)
