"""Decodes PNG and JPEG files into one array."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from experiments.common.errors import UsageError
from experiments.common.memory import memory
from experiments.data.arrays import Images
from experiments.data.progress import progress

_GRAY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
# Exceptions raised by Pillow's decoders for damaged files.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
# Larger images are not decoded: their size is known from the header, before memory is allocated.
_PIXELS = 1 << 24
# Bytes of a file: twice those of _PIXELS uncompressed pixels with four channels.
LARGEST = 1 << 27
# Images per task, so that the pool's overhead is small even for 32x32 images.
_BLOCK = 128

# Pillow warns about large images when it reads the header; here that is an error.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def decode(encoded: bytes, name: str, flag: str) -> Images:
    """One image, uint8 [H, W, 1] if it is grayscale, else [H, W, 3].

    The image is rotated by its EXIF orientation, and transparent parts are white.

    Args:
        encoded: PNG or JPEG bytes.
        name: The image's name in errors.
        flag: The argument that the error names, as in ``--dataset=folder:/x``.

    Raises:
        UsageError: The image is broken, too large, or neither 8-bit grayscale nor colour.
    """
    large = f"{flag}: {name} has more than {_PIXELS:,} pixels; resize it"
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > _PIXELS:
                raise UsageError(large)
            if image.mode not in _GRAY + _COLOUR:
                raise UsageError(
                    f"{flag}: {name} has the Pillow mode {image.mode!r}, which is neither 8-bit "
                    "grayscale nor colour; convert it"
                )
            gray = image.mode in _GRAY
            upright = _opaque(ImageOps.exif_transpose(image))
            pixels = np.asarray(upright.convert("L" if gray else "RGB"))
    except UsageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(large) from error
    except _BROKEN as error:
        # Pillow's message names the in-memory buffer, which does not help users.
        reason = "no PNG or JPEG" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UsageError(
            f"{flag}: {name} is a broken image ({reason}); replace or delete it"
        ) from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _opaque(image: Image.Image) -> Image.Image:
    """The image on white, if any of it is transparent."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def decode_all(
    count: int, read: Callable[[int], bytes], describe: Callable[[int], str], flag: str
) -> Images:
    """Decodes `count` images with a pool of threads; Pillow works outside the interpreter's lock.

    Args:
        count: The number of images, at least 1.
        read: Returns the encoded bytes of image i; called from several threads.
        describe: Returns the name of image i for an error.
        flag: The argument that an error names.

    Returns:
        uint8 [count, H, W, C]; C is 1 if every image is grayscale, else 3.

    Raises:
        UsageError: An image is broken or differs in size from the first one, or all images
            together exceed the memory.
    """
    height, width, _ = decode(read(0), describe(0), flag).shape
    needed = count * height * width * 3
    if needed > memory():
        raise UsageError(
            f"{flag}: {count:,} images of {width}x{height} take {needed / 1e9:,.0f} GB, and this "
            f"machine has {memory() / 1e9:,.0f} GB of memory; resize them or take fewer"
        )
    images = np.empty((count, height, width, 3), np.uint8)
    gray = np.empty(count, np.bool_)

    def block(start: int) -> int:
        stop = min(start + _BLOCK, count)
        for i in range(start, stop):
            pixels = decode(read(i), describe(i), flag)
            if pixels.shape[:2] != (height, width):
                raise UsageError(
                    f"{flag}: all images must have one size, but {describe(i)} is "
                    f"{pixels.shape[1]}x{pixels.shape[0]} and {describe(0)} is {width}x{height} "
                    "(width x height); resize them"
                )
            images[i] = pixels
            gray[i] = pixels.shape[2] == 1
        return stop - start

    with (
        progress("decoding images", count) as advance,
        ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool,
    ):
        tasks = [pool.submit(block, start) for start in range(0, count, _BLOCK)]
        try:
            for task in tasks:
                advance(task.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return np.ascontiguousarray(images[..., :1]) if gray.all() else images
