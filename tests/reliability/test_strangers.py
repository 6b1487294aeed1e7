"""Files from strangers: nothing is unpickled or run, nothing is read or written elsewhere."""

import ast
import io
import json
import pathlib
import pickle
import sys
import tarfile

import numpy as np
import pytest

from experiments.common.errors import UsageError
from experiments.data import folder, prepared
from experiments.data.archive import members
from fdg_jax.checkpoint import manifest, restore
from tests import networks
from tests.experiments.data.test_prepared import prepare, random_images
from tests.reliability import damage, faults

ROOT = pathlib.Path(__file__).parents[2]
FORBIDDEN = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "eval", "exec",
    "extract", "extractall", "unpack_archive",
}  # fmt: skip


def test_the_source_unpickles_runs_and_unpacks_nothing():
    files = [*(ROOT / "fdg_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    assert len(files) > 50
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = set()
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.partition(".")[0] for alias in node.names}
                names |= {(getattr(node, "module", None) or "").partition(".")[0]}
            elif isinstance(node, ast.Call):
                called = node.func
                # A method may be called eval; a function of that name is the dangerous one.
                method = {getattr(called, "attr", "")} - {"eval"}
                names = method | {getattr(called, "id", "")}
                for keyword in node.keywords:
                    if keyword.arg == "allow_pickle":
                        assert keyword.value.value is False, path
            assert not names & FORBIDDEN, (path, node.lineno, names & FORBIDDEN)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


@pytest.fixture
def image_folder(tmp_path) -> pathlib.Path:
    return faults.make_images(tmp_path / "images")


def test_a_cache_entry_with_objects_is_refused(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path / "cache"))
    arrays = folder.read(str(image_folder))
    (entry,) = (tmp_path / "cache").iterdir()
    trap = np.array([Trap(tmp_path / "sprung")], object)
    np.savez(entry, **(arrays._asdict() | {"class_names": trap}))
    folder.read(str(image_folder))
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()  # it would have worked


def test_a_prepared_data_set_imports_no_module(tmp_path, monkeypatch):
    images = random_images(3, (4, 4, 3))
    there = prepare(tmp_path, {"train": images, "test": images})
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "sprung.py").write_text("import sys; sys.sprung = True")
    monkeypatch.syspath_prepend(str(tmp_path / "trap"))
    whole = (there / "features.json").read_text()
    name = "tensorflow_datasets.core.features.image_feature.Image"
    for old, new in (
        (f'"pythonClassName": "{name}"', '"pythonClassName": "sprung.Image"'),
        (f'"pythonClassName": "{name}"', '"python_class_name": "sprung.Image"'),
        ('"featuresDict": {', '"type": "sprung.Image", "content": {'),
        ('"featuresDict": {', '"jsonFeature": {"json": "{}"}, "rest": {'),
    ):
        assert old in whole
        (there / "features.json").write_text(whole.replace(old, new))
        with pytest.raises(UsageError, match="lies outside of the data set"):
            prepared.read("shapes", str(tmp_path), "--dataset=tfds:shapes")
        assert not hasattr(sys, "sprung")


@pytest.mark.parametrize("key", ["filepathTemplate", "filepath_template", "name"])
def test_a_prepared_data_set_reads_no_file_elsewhere(tmp_path, key):
    images = random_images(3, (4, 4, 3))
    there = prepare(tmp_path, {"train": images, "test": images})
    info = json.loads((there / "dataset_info.json").read_text())
    info["splits"][0][key] = "../../elsewhere/{SPLIT}"
    (there / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UsageError, match="lies outside of the data set"):
        prepared.read("shapes", str(tmp_path), "--dataset=tfds:shapes")


def crc32c(content: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_a_checkpoint_reads_no_file_elsewhere(tmp_path):
    pipe = faults.two_checkpoints(tmp_path / "run")
    stage = tmp_path / "run" / "step-000000005" / "arrays" / "stage_0"
    # Its index names the file of its data. The store has no other way to name a file. A commit that
    # was overtaken by another may have left a second file, which nothing names.
    index = stage / "manifest.ocdbt"
    content = index.read_bytes()
    (data,) = (f for f in (stage / "d").iterdir() if f"d/{f.name}".encode() in content)
    assert crc32c(content[:-4]).to_bytes(4, "little") == content[-4:]
    name = f"d/{data.name}".encode()
    assert content.count(name) == 1
    elsewhere = "../" * 5 + "x" * (len(name) - 15)
    data.rename(stage / elsewhere)
    content = content.replace(name, elsewhere.encode())[:-4]
    index.write_bytes(content + crc32c(content).to_bytes(4, "little"))
    damage.reseal(stage.parents[1])
    with pytest.raises(manifest.Damaged, match="stage_0") as caught:
        restore.load(pipe, stage.parents[1], 5, networks.batches(1)[0], list)
    assert f'Invalid key: "{stage}/../../../' in str(caught.value.__cause__)


def test_members_that_climb_out_are_passed_over(tmp_path):
    path = tmp_path / "archive" / "a.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../up", "/tmp/fdg_jax_up", "a/../../up", "a"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"hi"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("link")
            info.type, info.linkname = kind, "../up"
            tar.addfile(info)
    assert members(path, {"a": 2}, "--dataset=x") == {"a": b"hi"}
    with pytest.raises(UsageError, match="as one plain file"):
        members(path, {"link": 0}, "--dataset=x")
    assert [p.name for p in tmp_path.rglob("*")] == ["archive", "a.tar.gz"]
    assert not pathlib.Path("/tmp/fdg_jax_up").exists()
