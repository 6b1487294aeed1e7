"""Images in folders."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.common.errors import UsageError
from experiments.data import load


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_reads_in_sorted_order(image_folder: Path) -> None:
    (image_folder / "train" / "ant" / "notes.txt").write_text("passed over")
    (image_folder / "train" / ".hidden").mkdir()
    dataset = load(f"folder:{image_folder}", None)
    assert dataset.class_names == ("ant", "bee")
    assert dataset.image_shape == (8, 10, 3)
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert dataset.test_labels.tolist() == [0, 1, 1]
    for i, file in enumerate(["ant/0", "ant/1", "ant/2", "bee/0", "bee/1"]):
        with Image.open(image_folder / "train" / f"{file}.png") as image:
            np.testing.assert_array_equal(dataset.train_images[i], np.asarray(image))


def test_more_images_than_one_block(tmp_path: Path) -> None:
    for i in range(300):
        save(tmp_path / "train" / "a" / f"{i:03d}.png", np.full((2, 2), i % 256, np.uint8))
    save(tmp_path / "test" / "a" / "0.png", np.zeros((2, 2), np.uint8))
    dataset = load(f"folder:{tmp_path}", None)
    assert dataset.train_images[:, 0, 0, 0].tolist() == [i % 256 for i in range(300)]


def test_gray_only_if_all_are(tmp_path: Path) -> None:
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    save(tmp_path / "train" / "a" / "0.PNG", gray)
    save(tmp_path / "test" / "a" / "0.png", gray)
    assert load(f"folder:{tmp_path}", None).image_shape == (3, 4, 1)
    save(tmp_path / "test" / "a" / "1.png", np.zeros((3, 4, 4), np.uint8))
    dataset = load(f"folder:{tmp_path}", None)
    assert dataset.image_shape == (3, 4, 3)
    np.testing.assert_array_equal(dataset.train_images[0], np.stack([gray] * 3, axis=-1))


def test_jpeg(image_folder: Path) -> None:
    save(image_folder / "train" / "ant" / "3.JPEG", np.full((8, 10, 3), 77, np.uint8))
    dataset = load(f"folder:{image_folder}", None)
    assert abs(int(dataset.train_images[3].mean()) - 77) <= 1


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken", None])
def test_broken_image_is_named(content: bytes | None, image_folder: Path) -> None:
    path = image_folder / "train" / "bee" / "1.png"
    if content is None:
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"--dataset=folder:.*bee/1\.png is a broken image"):
        load(f"folder:{image_folder}", None)


def test_16_bit_image_is_named(image_folder: Path) -> None:
    save(image_folder / "train" / "bee" / "1.png", np.zeros((8, 10), np.uint16))
    with pytest.raises(UsageError, match=r"bee/1\.png has the Pillow mode"):
        load(f"folder:{image_folder}", None)


def test_differing_sizes_are_named(image_folder: Path) -> None:
    save(image_folder / "test" / "bee" / "1.png", np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(UsageError, match=r"bee/1\.png is 9x8 and .*ant/0\.png is 10x8"):
        load(f"folder:{image_folder}", None)


def test_layout_errors(tmp_path: Path) -> None:
    name = f"folder:{tmp_path / 'x'}"
    with pytest.raises(UsageError, match="there is no such folder"):
        load(name, None)
    (tmp_path / "x" / "train").mkdir(parents=True)
    with pytest.raises(UsageError, match="test is missing"):
        load(name, None)
    (tmp_path / "x" / "test").mkdir()
    with pytest.raises(UsageError, match="train holds no class folder"):
        load(name, None)
    (tmp_path / "x" / "train" / "a").mkdir()
    with pytest.raises(UsageError, match="test holds no class folder"):
        load(name, None)
    (tmp_path / "x" / "test" / "a").mkdir()
    with pytest.raises(UsageError, match=r"train/a holds no \.png, \.jpg, \.jpeg file"):
        load(name, None)
    save(tmp_path / "x" / "train" / "a" / "0.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(UsageError, match=r"test/a holds no \.png"):
        load(name, None)
    (tmp_path / "x" / "test" / "b").mkdir()
    with pytest.raises(UsageError, match=r"test/b is a class that train/ does not have"):
        load(name, None)


@pytest.mark.skipif("FDG_CIFAR10_JPEG" not in os.environ, reason="FDG_CIFAR10_JPEG is not set")
def test_cifar10_jpeg() -> None:
    dataset = load(f"folder:{os.environ['FDG_CIFAR10_JPEG']}", None)
    assert dataset.class_names[0] == "airplane"
    assert np.bincount(dataset.train_labels).tolist() == [5_000] * 10
    assert np.bincount(dataset.test_labels).tolist() == [1_000] * 10
    np.testing.assert_allclose(dataset.mean, [0.4914, 0.4822, 0.4465], atol=2e-3)


def test_orientation_and_transparency(image_folder: Path) -> None:
    pixels = np.zeros((10, 8, 3), np.uint8)
    pixels[:5] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees, clockwise: the white half is on the right
    file = image_folder / "train" / "ant" / "0.png"
    Image.fromarray(pixels).save(file, exif=exif)
    rgba = np.zeros((8, 10, 4), np.uint8)
    rgba[..., 0], rgba[2:5, 2:5, 3] = 255, 255
    save(image_folder / "train" / "ant" / "1.png", rgba)
    dataset = load(f"folder:{image_folder}", None)
    turned, red = dataset.train_images[:2]
    assert turned.shape == (8, 10, 3)
    assert (turned[:, 5:] == 255).all()
    assert (turned[:, :5] == 0).all()
    assert red[0, 0].tolist() == [255, 255, 255]
    assert red[3, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.webp", "is no PNG or JPEG; convert"), ("sub/0.png", "lies in a folder inside the class")],
)
def test_images_that_would_be_missed_are_named(name: str, message: str, image_folder: Path) -> None:
    file = image_folder / "train" / "ant" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    with pytest.raises(UsageError, match=message):
        load(f"folder:{image_folder}", None)


def test_images_outside_of_the_classes_are_named(image_folder: Path) -> None:
    save(image_folder / "train" / "0.png", np.zeros((8, 10, 3), np.uint8))
    with pytest.raises(UsageError, match=r"train/0\.png lies in no class folder; move or delete"):
        load(f"folder:{image_folder}", None)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_orientation_and_every_form_of_transparency(
    mode: str, orientation: int, image_folder: Path
) -> None:
    for file in sorted(image_folder.glob("*/*/*.png")):
        save(file, np.zeros((8, 8, 3), np.uint8))
    corner = np.zeros((8, 8, 4), np.uint8)
    corner[..., 3] = 255
    corner[:4, :4, 3] = 0  # the upper left quarter shows the ground
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(corner)
    if mode == "P":
        picture = Image.fromarray((corner[..., 3] > 0).astype(np.uint8), mode="P")
        picture.putpalette([255, 0, 0, 0, 0, 0])
        picture.info["transparency"] = 0
    else:
        picture = picture.convert(mode)
    picture.save(image_folder / "train" / "ant" / "0.png", exif=exif)
    found = load(f"folder:{image_folder}", None).train_images[0]
    # Where the first row and the first column of what is stored are shown.
    low, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    quarter = found[4 * low : 4 * low + 4, 4 * right : 4 * right + 4]
    assert (quarter == 255).all()
    assert int((found == 255).all(axis=-1).sum()) == 16


def test_skipped_files_are_counted(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("Thumbs.db", "._0.png", "notes.txt"):
        (image_folder / "train" / "ant" / name).write_bytes(b"x")
    (image_folder / "test" / "labels.csv").write_bytes(b"x")
    assert load(f"folder:{image_folder}", None).train_labels.tolist() == [0, 0, 0, 1, 1]
    assert "skipped 3 files that are no images, such as" in capsys.readouterr().err


def test_class_names_are_compared_composed(image_folder: Path) -> None:
    for split, form in (("train", "NFC"), ("test", "NFD")):
        name = unicodedata.normalize(form, "caf\u00e9")
        (image_folder / split / "bee").rename(image_folder / split / name)
    assert load(f"folder:{image_folder}", None).class_names == ("ant", "caf\u00e9")
    (image_folder / "train" / "ant").rename(image_folder / "train" / "cafe\u0301")
    with pytest.raises(UsageError, match="two folders in"):
        load(f"folder:{image_folder}", None)
