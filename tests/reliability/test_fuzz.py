"""Anything for a checkpoint: it is restored, or named and passed over, or refused with one line."""

import hashlib
import json
import pathlib
import shutil

import hypothesis
import pytest
from hypothesis import strategies as st

from fdg_jax.checkpoint import manifest
from tests import networks
from tests.reliability import damage, faults
from tests.reliability.mutation import changed_bytes, changed_json, examples, one_line


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return faults.two_checkpoints(folder), folder


def fresh(two: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.rmtree(tmp_path / "here", ignore_errors=True)
    return pathlib.Path(shutil.copytree(two, tmp_path / "here"))


@examples(0.2)
@hypothesis.given(data=st.data())
def test_files_changed_by_accident(two, tmp_path, data):
    pipe, folder = two[0], fresh(two[1], tmp_path)
    newest = folder / "step-000000005"
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    path = newest / data.draw(st.sampled_from(files), label="file")
    before = path.read_bytes()
    path.write_bytes(changed_bytes(data.draw, before))
    same = path.read_bytes() == before
    step, said = faults.restored(pipe, folder)
    assert (step, len(said)) == ((5, 0) if same else (3, 1))


def goes_on(pipe, folder: pathlib.Path) -> None:
    """What was restored can be trained; what is refused is refused in one line."""
    try:
        step, said = faults.restored(pipe, folder)
    except ValueError as error:
        one_line(error, "start the run anew")
        return
    assert all("\n" not in line for line in said)
    assert step in (3, 5)


@examples(0.2)
@hypothesis.given(data=st.data())
def test_manifests_changed_by_a_stranger(two, tmp_path, data):
    pipe, folder = two[0], fresh(two[1], tmp_path)
    path = folder / "step-000000005" / manifest.NAME
    body = json.loads(path.read_text())["body"]
    part = data.draw(st.sampled_from([None, *(key for key in body if key != "files")]))
    for _ in range(data.draw(st.integers(1, 2))):
        if part is None or part not in body:
            body = changed_json(data.draw, body)
        else:
            body[part] = changed_json(data.draw, body[part])
        if not isinstance(body, dict):
            break
    path.write_text(json.dumps({"sha256": manifest_hash(body), "body": body}))
    goes_on(pipe, folder)


def manifest_hash(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@examples(0.2)
@hypothesis.given(data=st.data())
def test_arrays_changed_by_a_stranger(two, tmp_path, data):
    pipe, folder = two[0], fresh(two[1], tmp_path)
    newest = folder / "step-000000005"
    if data.draw(st.booleans(), label="inside"):
        store = damage.store(newest, data.draw(st.integers(0, 2)))
        keys = sorted(store.list().result())
        key = keys[data.draw(st.integers(0, 200)) % len(keys)]
        whole = bytes(store[key])
        if key.endswith(b"json") and data.draw(st.booleans()):
            store[key] = json.dumps(changed_json(data.draw, json.loads(whole))).encode()
        else:
            store[key] = changed_bytes(data.draw, whole)
    else:
        files = sorted((newest / "arrays").rglob("*"), key=lambda p: (p.parent, p.is_file()))
        files = [path for path in files if path.is_file()]
        path = files[data.draw(st.integers(0, 200)) % len(files)]
        path.write_bytes(changed_bytes(data.draw, path.read_bytes()))
    damage.reseal(newest)
    goes_on(pipe, folder)


def test_what_is_restored_is_trained(two, tmp_path):
    """That a state has the form of one of the pipeline's is enough for it to go on."""
    pipe, folder = two[0], fresh(two[1], tmp_path)
    state, _ = faults.Checkpointer(folder, pipe).restore(networks.batches(1)[0])
    state, metrics = pipe.step(state, networks.batches(1)[0])
    assert metrics[0].batch == 3
    pipe.drain(state)
