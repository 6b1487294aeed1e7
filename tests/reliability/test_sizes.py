"""Files from strangers: no memory is taken for what they only declare."""

import gzip
import io
import pathlib
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest

from experiments.common.errors import UsageError
from experiments.data import folder
from tests.reliability import damage, faults

ROOT = pathlib.Path(__file__).parents[2]

# A process may take 256 MB more than it has.

LIMITED = """
import resource, sys
import tests.conftest
{setup}
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (1 << 28)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
{body}
"""


def limited(setup: str, body: str) -> str:
    """What a program says that is not given the memory that a file declares."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(setup=setup, body=body)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_images_take_no_memory_before_their_size_is_checked(tmp_path):
    zeros = zlib.compress(bytes(1 << 24), 9) * 4
    files = {
        "declares.png": png(60_000, 60_000, zeros),
        "large.png": png(12_000, 12_000, zeros),  # Pillow alone would only warn
        "wide.png": png(2**31 - 1, 1, zeros),
        "zero.png": png(0, 8, zeros),
        "text.png": png(8, 8, zeros)[:33] + png(8, 8, zlib.compress(bytes(1 << 28)))[33:],
    }
    sparse = tmp_path / "sparse.png"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    said = limited(
        "from experiments.data.images import decode\n"
        "from experiments.data import folder\n"
        "from experiments.common.errors import UsageError",
        f"for name in {sorted(files)}:\n"
        "    try:\n"
        f"        decode(open(f'{tmp_path}/{{name}}', 'rb').read(), name, '--dataset=x')\n"
        "    except UsageError as error:\n"
        "        print(error)\n"
        "try:\n"
        f"    folder._bytes('{sparse}', '--dataset=x')\n"
        "except UsageError as error:\n"
        "    print(error)\n",
    ).splitlines()
    assert len(said) >= 5
    for name in ("declares", "large", "wide"):
        assert f"--dataset=x: {name}.png has more than 16,777,216 pixels; resize it" in said
    assert any("sparse.png has more than 134,217,728 bytes" in line for line in said)


def test_a_data_set_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("experiments.data.images.memory", lambda: 50 * 8 * 8 * 3)
    root = faults.make_images(tmp_path / "images")
    with pytest.raises(UsageError, match=r"64 images of 8x8 take 0 GB, and this machine has"):
        folder.read(str(root))


def test_archives_take_no_memory_before_their_size_is_checked(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        info = tarfile.TarInfo("name")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 29
        tar.addfile(info, io.BytesIO(bytes(1 << 29)))
    (tmp_path / "bomb.tar.gz").write_bytes(out.getvalue())
    head = tarfile.TarInfo("other")
    head.size = 1 << 50
    (tmp_path / "petabyte.tar.gz").write_bytes(gzip.compress(head.tobuf() + bytes(2048)))
    said = limited(
        "import pathlib\n"
        f"root = pathlib.Path('{tmp_path}')\n"
        "from experiments.data.archive import members\n"
        "from experiments.common.errors import UsageError",
        "for name in ('bomb', 'petabyte'):\n"
        "    try:\n"
        "        members(root / f'{name}.tar.gz', {'a': 10}, '--dataset')\n"
        "    except UsageError as error:\n"
        "        print(error)\n",
    ).splitlines()
    assert "unpacks to more than it should hold" in said[0]
    assert "ends inside of a member" in said[1]


def test_cache_entries_take_no_memory_before_their_size_is_checked(tmp_path):
    fields = ("train_images", "train_labels", "test_images", "test_labels", "class_names")

    def entry(name: str, compression: int, member: bytes) -> None:
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", compression) as file:
            for field in fields:
                file.writestr(f"{field}.npy", member)
                member = b""

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40,)}
    )
    entry("declares", zipfile.ZIP_STORED, header.getvalue())
    full = io.BytesIO()
    np.save(full, np.zeros(1 << 29, np.uint8))
    entry("bomb", zipfile.ZIP_DEFLATED, full.getvalue())
    said = limited(
        "import logging, os\n"
        f"os.environ['FDG_CACHE_DIR'] = '{tmp_path}'\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "from experiments.data import cache",
        "for name in ('declares', 'bomb'):\n"
        "    try:\n"
        "        cache.cached(name, lambda: 1 / 0)\n"
        "    except ZeroDivisionError:\n"
        "        print('decoded again')\n",
    )
    assert said.count("decoded again") == 2
    assert "has not the size that its header says" in said
    assert "is compressed" in said


def test_checkpoints_take_no_memory_before_their_size_is_checked(tmp_path):
    said = limited(
        "import shutil, pathlib\n"
        "from tests.reliability import damage, faults\n"
        f"root = pathlib.Path('{tmp_path}')\n"
        "pipe = faults.two_checkpoints(root / 'two')\n"
        "faults.restored(pipe, root / 'two')\n",
        "for i, (name, harm) in enumerate(damage.STRANGERS.items()):\n"
        "    shutil.copytree(root / 'two', root / str(i))\n"
        "    print(name, faults.damaged(pipe, root / str(i), harm))\n",
    )
    assert len(said.splitlines()) == len(damage.STRANGERS)


def test_a_batch_in_flight_is_no_larger_than_those_of_the_run(tmp_path):
    pipe = faults.two_checkpoints(tmp_path / "run")

    def gigabytes(body):
        for name, found in body["sections"][0]:
            if name.startswith("flight"):
                found[0][1][0] = 10**9

    damage.reseal(tmp_path / "run" / "step-000000005", gigabytes)
    with pytest.raises(ValueError, match=r"flight.*inputs.*has float64\[1000000000,4\]"):
        faults.restored(pipe, tmp_path / "run")
