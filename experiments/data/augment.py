"""Augmentation on the device."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def normalise(images: ArrayLike, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """uint8 pixels to float32 with mean 0 and standard deviation 1: ``(x / 255 - mean) / std``.

    Args:
        images: uint8 [..., C].
        mean: Per channel, as a fraction of the pixel range, [C].
        std: Likewise.
    """
    pixels = jnp.asarray(images).astype(jnp.float32) / 255
    return (pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def augment(
    key: jax.Array,
    step: ArrayLike,
    images: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike,
    *,
    padding: int = 4,
    flip: bool = True,
) -> jax.Array:
    """Pads with black, crops at random, mirrors half of the images, then normalises.

    A pure function for use inside ``jax.jit`` (`padding` and `flip` static), with the random key
    ``fold_in(key, step)`` and one draw per example.

    Args:
        key: The root key of the augmentation.
        step: The number of the mini-batch, an integer.
        images: uint8 [B, H, W, C].
        mean: Per channel, as a fraction of the pixel range, [C].
        std: Likewise.
        padding: Pixels added on each side before cropping back to H x W; 0: none.
        flip: Whether to mirror left and right with probability 1/2.

    Returns:
        float32 [B, H, W, C].
    """
    images = jnp.asarray(images)
    batch, height, width, _ = images.shape
    # Explicit dtypes, so that jax_enable_x64 does not change the random numbers.
    crop_key, flip_key = jax.random.split(jax.random.fold_in(key, step))
    if padding:
        # Black before normalising, as usual for CIFAR, so padding is not 0 afterwards.
        border = (padding, padding)
        padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
        offsets = jax.random.randint(crop_key, (batch, 2), 0, 2 * padding + 1, jnp.int32)
        rows = offsets[:, :1] + jnp.arange(height)
        columns = offsets[:, 1:] + jnp.arange(width)
        images = padded[jnp.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if flip:
        mirrored = jax.random.bernoulli(flip_key, jnp.float32(0.5), shape=(batch, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return normalise(images, mean, std)
