"""Ways to damage a checkpoint: by accident, or maliciously with valid hashes."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import tensorstore as ts

from fdg_jax.checkpoint import manifest

# Without the sharding codec that Orbax uses.
PLAIN = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
]
Damage = Callable[[pathlib.Path], object]


def reseal(folder: pathlib.Path, change: Callable[[dict[str, Any]], object] | None = None) -> None:
    """Optionally changes the manifest, and recomputes all hashes."""
    path = folder / manifest.NAME
    body = json.loads(path.read_text())["body"]
    del body["files"]
    if change is not None:
        change(body)
    path.unlink()
    manifest.write(folder, body)


def store(folder: pathlib.Path, stage: int = 0) -> Any:
    """The store of a stage's arrays, from keys such as params/0/zarr.json to bytes."""
    base = {"driver": "file", "path": f"{folder}/arrays/stage_{stage}/"}
    return ts.KvStore.open({"driver": "ocdbt", "base": base}).result()


def metadata(folder: pathlib.Path, name: str, **changes: Any) -> None:
    """Changes the metadata of an array of stage 0."""
    own = store(folder)
    key = f"{name}/zarr.json"
    own[key] = json.dumps({**json.loads(own[key]), **changes}).encode()
    reseal(folder)


def content(folder: pathlib.Path, name: str, value: bytes | None) -> None:
    """Changes the values of an array of stage 0 with two axes, or removes its metadata."""
    own = store(folder)
    if value is None:
        del own[f"{name}/zarr.json"]
    else:
        own[f"{name}/c/0/0"] = value
    reseal(folder)


def bomb(size: int) -> bytes:
    """A zstd frame of ``size`` zeros, compressed by a factor of 30,000."""
    block = 1 << 17
    frame = bytearray(b"\x28\xb5\x2f\xfd\x00\x58")
    for left in range(size // block, 0, -1):
        frame += (block << 3 | 1 << 1 | (left == 1)).to_bytes(3, "little") + b"\0"
    return bytes(frame)


def regular(shape: list[int]) -> dict[str, Any]:
    """The chunk grid of an array."""
    return {"name": "regular", "configuration": {"chunk_shape": shape}}


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def folder_instead(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def link_instead(path: pathlib.Path) -> None:
    """Replaces a file by a link to the same content."""
    elsewhere = path.rename(_checkpoint(path).parent / "elsewhere")
    path.symlink_to(elsewhere)


def _checkpoint(path: pathlib.Path) -> pathlib.Path:
    return next(parent for parent in path.parents if parent.name.startswith("step-"))


def _data(folder: pathlib.Path) -> pathlib.Path:
    return max((folder / "arrays").glob("*/d/*"), key=lambda path: path.stat().st_size)


def _of(name: str, damage: Damage) -> Damage:
    return lambda folder: damage(folder / name)


def _replaced_by_file(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def _swapped(folder: pathlib.Path) -> None:
    a, b, c = (folder / "arrays" / name for name in ("stage_0", "stage_1", "between"))
    a.rename(c)
    b.rename(a)
    c.rename(b)


def _field(**values: Any) -> Damage:
    return lambda folder: reseal(folder, lambda body: body.update(values))


def _without(name: str) -> Damage:
    return lambda folder: reseal(folder, lambda body: body.pop(name))


def _text(text: str) -> Damage:
    return _of("manifest.json", lambda path: path.write_text(text))


# For a checkpoint of the network in tests/checkpoint/test_checkpointer.py, K = 3, step 5.
ACCIDENTS: dict[str, Damage] = {
    "manifest cut": _of("manifest.json", cut),
    "manifest emptied": _of("manifest.json", empty),
    "manifest flipped": _of("manifest.json", flip),
    "manifest removed": _of("manifest.json", pathlib.Path.unlink),
    "manifest a folder": _of("manifest.json", folder_instead),
    "manifest a link": _of("manifest.json", link_instead),
    "manifest other JSON": _text("[1, 2]"),
    "manifest nested 100,000 deep": _text("[" * 10**5),
    "arrays cut": lambda folder: cut(_data(folder)),
    "arrays emptied": lambda folder: empty(_data(folder)),
    "arrays flipped": lambda folder: flip(_data(folder)),
    "arrays removed": lambda folder: _data(folder).unlink(),
    "arrays a folder": lambda folder: folder_instead(_data(folder)),
    "arrays a link": lambda folder: link_instead(_data(folder)),
    "index of a stage flipped": _of("arrays/stage_1/manifest.ocdbt", flip),
    "metadata of a stage removed": _of("arrays/stage_1/manifest.ocdbt", pathlib.Path.unlink),
    "a stage removed": _of("arrays/stage_2", shutil.rmtree),
    "two stages swapped": _swapped,
    "a file added": _of("arrays/more", pathlib.Path.touch),
    "a link added": _of("arrays/more", lambda path: path.symlink_to("/")),
    "all but the folder removed": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a file in its place": _replaced_by_file,
    "a link to nowhere in its place": lambda folder: (
        shutil.rmtree(folder),
        folder.symlink_to("nothing"),
    ),
}
STRANGERS: dict[str, Damage] = {
    "hashes fit: a field missing": _without("counts"),
    "hashes fit: a field of another type": _field(tick="5"),
    "hashes fit: another tick": _field(tick=6),
    "hashes fit: another step": _field(step=7),
    "hashes fit: a random key of another kind": _field(key=["md5", [0, 7]]),
    "hashes fit: extra is no JSON": _field(extra="json:{"),
    "hashes fit: nothing in flight": lambda folder: reseal(
        folder, lambda body: body["counts"][0]["flights"].clear()
    ),
    "hashes fit: stages swapped": lambda folder: (_swapped(folder), reseal(folder)),
    "hashes fit: an array missing": lambda folder: content(folder, "params/1", None),
    "hashes fit: an array of petabytes": lambda folder: metadata(
        folder, "params/1", shape=[10**9, 10**6]
    ),
    "hashes fit: an array of another type": lambda folder: metadata(
        folder, "params/1", data_type="int64"
    ),
    "hashes fit: pieces of gigabytes": lambda folder: metadata(
        folder, "params/1", codecs=PLAIN, chunk_grid=regular([4, 10**9])
    ),
    "hashes fit: 24 values that unpack to 4 GB": lambda folder: (
        metadata(folder, "params/1", codecs=PLAIN),
        content(folder, "params/1", bomb(1 << 32)),
    ),
    "hashes fit: values that are none": lambda folder: content(folder, "params/1", b"\1" * 99),
}
