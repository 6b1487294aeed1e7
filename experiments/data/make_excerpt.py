"""Creates the bundled excerpt of Fashion-MNIST from the original files.

python -m experiments.data.make_excerpt --source=DIR, where DIR holds train-images-idx3-ubyte.gz
and its three companions; 20 seconds.
"""

import argparse
import gzip
import io
import lzma
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.common.errors import UsageError

Bytes = npt.NDArray[np.uint8]

_TRAIN_PER_CLASS = 1_000
_TEST_PER_CLASS = 200
_OUTPUT = Path(__file__).parent / "fashion_mnist_small" / "excerpt.npz.xz"
# Position bits are useless for rows of 28 bytes; without them the file is smaller.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lp": 0, "pb": 0}]


def read_idx(path: Path) -> Bytes:
    """Reads a gzipped IDX file of bytes: 0, 0, 8, the rank, the dimensions, the data.

    Raises:
        UsageError: The file is missing or not an IDX file.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UsageError(
            f"--source={path.parent}: {path.name} cannot be read ({error}); "
            "name the folder with the four .gz files of Fashion-MNIST"
        ) from error
    rank = data[3] if data[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(data, ">u4", count=rank, offset=4).tolist()
    if not rank or len(data) != 4 + 4 * rank + np.prod(shape):
        raise UsageError(f"--source={path.parent}: {path.name} is no IDX file; replace it")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def excerpt(images: Bytes, labels: Bytes, per_class: int) -> tuple[Bytes, Bytes]:
    """The first `per_class` images of each class, in their original order."""
    chosen = [np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]
    indices = np.sort(np.concatenate(chosen))
    return images[indices], labels[indices]


def make(source: Path, output: Path) -> None:
    """Writes the excerpt of the data set in `source` to `output`."""
    arrays = {}
    for split, prefix, size in (
        ("train", "train", _TRAIN_PER_CLASS),
        ("test", "t10k", _TEST_PER_CLASS),
    ):
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = excerpt(images, labels, size)
    plain = io.BytesIO()
    np.savez(plain, allow_pickle=False, **arrays)
    # xz of an uncompressed .npz is 15 % smaller than savez_compressed.
    output.write_bytes(lzma.compress(plain.getvalue(), filters=_FILTERS))


def main() -> int:
    """The program; returns the exit status."""
    parser = argparse.ArgumentParser(description="Makes the embedded excerpt of Fashion-MNIST.")
    parser.add_argument("--source", type=Path, required=True, help="folder with the four .gz files")
    parser.add_argument("--output", type=Path, default=_OUTPUT, help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        make(arguments.source, arguments.output)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
