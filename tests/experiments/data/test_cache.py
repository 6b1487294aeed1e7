"""The cache of decoded images."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.data import cache, load


def test_second_load_decodes_nothing(
    image_folder: Path, cache_dir: Path, decoded: list[object]
) -> None:
    first = load(f"folder:{image_folder}", None)
    assert decoded
    assert [p.suffix for p in cache_dir.iterdir()] == [".npz"]
    decoded.clear()
    second = load(f"folder:{image_folder}", None)
    assert not decoded
    np.testing.assert_array_equal(first.train_images, second.train_images)
    np.testing.assert_array_equal(first.test_labels, second.test_labels)
    assert first.class_names == second.class_names


def test_changed_file_is_decoded_again(image_folder: Path) -> None:
    path = image_folder / "train" / "ant" / "0.png"
    before = load(f"folder:{image_folder}", None)
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(path)
    after = load(f"folder:{image_folder}", None)
    assert before.train_images[0].any()
    assert not after.train_images[0].any()


def test_key_depends_on_time_size_and_place(tmp_path: Path) -> None:
    file = tmp_path / "a" / "x"
    file.parent.mkdir()
    file.write_bytes(b"1")
    os.utime(file, ns=(0, 1))
    keys = [cache.key("s", tmp_path / "a", [str(file)])]
    assert cache.key("s", tmp_path / "a", [str(file)]) == keys[0]
    keys.append(cache.key("other", tmp_path / "a", [str(file)]))
    keys.append(cache.key("s", tmp_path, [str(file)]))
    os.utime(file, ns=(0, 2))
    keys.append(cache.key("s", tmp_path / "a", [str(file)]))
    file.write_bytes(b"12")
    os.utime(file, ns=(0, 1))
    keys.append(cache.key("s", tmp_path / "a", [str(file)]))
    assert len(set(keys)) == 5


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "pickle", "labels", "folder"])
def test_damaged_entry_is_decoded_again(
    damage: str, image_folder: Path, cache_dir: Path, decoded: list[object]
) -> None:
    first = load(f"folder:{image_folder}", None)
    (entry,) = cache_dir.iterdir()
    content = bytearray(entry.read_bytes())
    with np.load(entry) as file:
        fields = dict(file)
    match damage:
        case "empty":
            entry.write_bytes(b"")
        case "truncated":
            entry.write_bytes(content[: len(content) // 2])
        case "flipped":
            content[500] ^= 0xFF
            entry.write_bytes(content)
        case "pickle":
            names = np.array(fields.pop("class_names"), object)
            np.savez(entry, allow_pickle=True, class_names=names, **fields)
        case "labels":
            np.savez(entry, **(fields | {"train_labels": fields["train_labels"] + 5}))
        case "folder":
            entry.unlink()
            entry.mkdir()
    decoded.clear()
    second = load(f"folder:{image_folder}", None)
    assert decoded
    np.testing.assert_array_equal(first.train_images, second.train_images)
    if damage != "folder":
        decoded.clear()
        load(f"folder:{image_folder}", None)
        assert not decoded


def test_unwritable_directory_is_no_error(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A file where the folder should be: it stops root, too.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert load(f"folder:{image_folder}", None).num_classes == 2
    assert "not cached" in caplog.text


def test_failed_write_leaves_nothing(
    image_folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert load(f"folder:{image_folder}", None).num_classes == 2
    assert not list(cache_dir.iterdir())


def test_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDG_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.directory() == Path("/a")
    monkeypatch.delenv("FDG_CACHE_DIR")
    assert cache.directory() == Path("/b/fdg_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory() == Path("~/.cache/fdg_jax").expanduser()
