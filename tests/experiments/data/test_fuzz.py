"""Anything for the files of a data set: it is read, or refused with one line."""

import gzip
import io
import json
import os
import pathlib
import shutil
import tarfile
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from experiments.common.errors import UsageError
from experiments.data import cifar, folder, prepared
from experiments.data.archive import members
from tests.experiments.data.test_prepared import prepare, random_images
from tests.reliability.mutation import changed_bytes, changed_json, examples, one_line


def images_of(pixels: np.ndarray) -> list[bytes]:
    found = []
    for kind, options in (("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {})):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, **options)
        found.append(file.getvalue())
    palette = io.BytesIO()
    Image.fromarray(pixels).quantize(8).save(palette, "PNG", transparency=1)
    return [*found, palette.getvalue(), b"BM" + bytes(60), b"<svg/>"]


@examples(0.8)
@hypothesis.given(data=st.data())
def test_images(image_folder, cache_dir, data):
    path = image_folder / "train" / "bee" / "1.png"
    content = data.draw(
        st.sampled_from(images_of(np.arange(240, dtype=np.uint8).reshape(8, 10, 3)))
    )
    for _ in range(data.draw(st.integers(0, 3))):
        content = changed_bytes(data.draw, content)
    path.write_bytes(content)
    shutil.rmtree(cache_dir, ignore_errors=True)
    try:
        folder.read(str(image_folder)).check()
    except UsageError as error:
        one_line(error, path)


@pytest.mark.parametrize("what", ["folder", "loop", "nowhere", "device", "pipe", "secret"])
def test_what_is_no_image_file(image_folder, what):
    path = image_folder / "train" / "bee" / "x.png"
    match what:
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "nowhere":
            path.symlink_to(path.with_name("nothing"))
        case "device":
            path.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(path)
        case "secret":
            path.symlink_to(__file__)
    try:
        arrays = folder.read(str(image_folder))
    except (UsageError, OSError) as error:  # `setup.make` says what an OSError was about
        one_line(error, path)
    else:
        assert len(arrays.train_images) == 5  # passed over


TAR_TYPES = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]


@examples(0.5)
@hypothesis.given(data=st.data())
def test_archives(tmp_path, data):
    path, sizes = tmp_path / "a.tar.gz", {"a/train.bin": 3000, "a/names.txt": None}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in [
            "a/train.bin",
            "a/names.txt",
            *data.draw(
                st.lists(
                    st.sampled_from(["../up", "/tmp/up", "a/train.bin", "a/../../up", "b" * 300]),
                    max_size=3,
                )
            ),
        ]:
            info = tarfile.TarInfo(name)
            info.type = data.draw(st.sampled_from([tarfile.REGTYPE] * 8 + TAR_TYPES))
            info.linkname = "/etc/passwd"
            content = bytes(3000 if name.endswith("bin") else 20)
            info.size = len(content)
            info.pax_headers = data.draw(
                st.sampled_from([{}, {"size": "9" * 15}, {"x": "y" * 999}])
            )
            tar.addfile(info, io.BytesIO(content))
    plain = out.getvalue()
    packed = changed_bytes(data.draw, plain) if data.draw(st.booleans()) else plain
    packed = gzip.compress(packed, 1)
    packed = changed_bytes(data.draw, packed) if data.draw(st.booleans()) else packed
    path.write_bytes(packed)
    try:
        found = members(path, sizes, "--dataset=cifar10")
    except UsageError as error:
        one_line(error, path)
    else:
        assert len(found["a/train.bin"]) == 3000
        assert found.keys() == sizes.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


@examples(0.15)
@hypothesis.given(data=st.data())
def test_cifar_archives(fake_cifar, tmp_path, data):
    fake, root = fake_cifar("cifar10"), tmp_path / "data"
    shutil.rmtree(root, ignore_errors=True)
    path = fake.write(root)
    path.write_bytes(changed_bytes(data.draw, path.read_bytes()))
    try:
        cifar.read("cifar10", str(root), cifar=fake.cifar).check()
    except UsageError as error:
        one_line(error)
        assert not (root / "cifar10").exists()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> pathlib.Path:
    """A data set as tensorflow-datasets prepares it."""
    images = random_images(4, (4, 4, 3))
    return prepare(tmp_path_factory.mktemp("shapes"), {"train": images, "test": images})


@examples(0.5)
@hypothesis.given(data=st.data())
def test_prepared_data_sets(shapes, tmp_path, cache_dir, data):
    root = tmp_path / "tfds"
    shutil.rmtree(root, ignore_errors=True)
    shutil.rmtree(cache_dir, ignore_errors=True)
    there = root / "shapes" / "1.0.0"
    shutil.copytree(shapes, there)
    path = data.draw(st.sampled_from(sorted(there.iterdir())), label="file")
    if path.suffix == ".json" and data.draw(st.booleans()):
        value = json.loads(path.read_text())
        for _ in range(data.draw(st.integers(1, 2))):
            value = changed_json(data.draw, value)
        path.write_text(json.dumps(value))
    else:
        path.write_bytes(changed_bytes(data.draw, path.read_bytes()))
    try:
        prepared.read("shapes", str(root), "--dataset=tfds:shapes").check()
    except UsageError as error:
        one_line(error)


@examples(0.5)
@hypothesis.given(data=st.data())
@pytest.mark.filterwarnings("default:Reading .* required additional header parsing")
def test_cache_entries(image_folder, cache_dir, data):
    shutil.rmtree(cache_dir, ignore_errors=True)
    arrays = folder.read(str(image_folder))
    (entry,) = cache_dir.glob("*.npz")
    whole = entry.read_bytes()
    if data.draw(st.booleans()):
        entry.write_bytes(changed_bytes(data.draw, whole))
        again = folder.read(str(image_folder))
        for one, other in zip(arrays, again, strict=True):
            np.testing.assert_array_equal(one, other)
    else:  # as a stranger would, who makes the checksums fit
        with zipfile.ZipFile(entry) as file:
            parts = {info.filename: file.read(info) for info in file.infolist()}
        name = data.draw(st.sampled_from(sorted(parts)))
        parts[name] = changed_bytes(data.draw, parts[name])
        with zipfile.ZipFile(entry, "w", data.draw(st.sampled_from([0, 8, 12, 14]))) as file:
            for name, content in parts.items():
                file.writestr(name, content)
        folder.read(str(image_folder)).check()
