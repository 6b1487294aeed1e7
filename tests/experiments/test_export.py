"""experiments.export: the model that it writes predicts what the run's stages predict."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

import fdg_jax as fdg
from experiments import data, export
from experiments.common.errors import UsageError
from experiments.exporting import model_file
from experiments.training.loop import params_sha256
from fdg_jax.checkpoint import manifest
from fdg_jax.partition.layerwise import join, separate
from tests.experiments.made import (
    DATASET,
    IMAGES,
    LABELS,
    NAMES,
    Linen,
    Nnx,
    X,
    begin,
    create,
    save,
    scattered,
)
from tests.thinned import thinned

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def made():
    """A network and a data set that take no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *arguments, **options: DATASET)
        patch.setattr(fdg.models, "create", create)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints with batches in flight."""
    folder = tmp_path_factory.mktemp("run") / "a"
    run, state = begin(folder, model="tiny")
    predicted = {}
    for step in range(1, 6):
        state, _ = run.pipe.step(state, (X, LABELS[:8]))
        if step in (3, 5):
            predicted[step] = save(folder, run, state, step)
    return folder, predicted


def predict(path):
    """With what is in the file alone."""
    params, model_state, about = model_file.load(path)
    network = fdg.chain(model_file.layers(about))
    x = data.normalise(IMAGES[:8], about["mean"], about["std"])
    outputs, _ = jax.jit(lambda *v: network.apply(*v, train=False, key=None))(
        params, model_state, x
    )
    return np.asarray(outputs), about


def cut_again(path):
    """The parameters in the run's stages."""
    params, _, about = model_file.load(path)
    layers = model_file.layers(about)
    parts, stages = separate(fdg.chain(layers), params), []
    for stage in fdg.partition(layers, 3, X, cost=[2, 4]):
        stages.append(join(stage, parts[: stage.size]))
        parts = parts[stage.size :]
    return stages


@pytest.mark.parametrize("kind", model_file.FORMATS)
def test_the_model_predicts_what_the_stages_predict(trained, tmp_path, kind):
    folder, predicted = trained
    for checkpoint, step in (("last", 5), ("3", 3)):
        line = export.export(str(folder), str(tmp_path / kind), kind, checkpoint, overwrite=True)
        assert line.startswith(f"tiny after step {step}, ")
        outputs, about = predict(tmp_path / kind)
        np.testing.assert_allclose(outputs, predicted[step][0], rtol=1e-5, atol=1e-6)
        assert params_sha256(cut_again(tmp_path / kind)) == predicted[step][1]
        assert len(about.pop("sha256")) == 64
        assert about == {
            "experiment": "cifar",
            "model": "tiny",
            "dataset": "folder:images",
            "num_classes": 3,
            "class_names": list(NAMES),
            "image_shape": [8, 8, 3],
            "mean": [0.5] * 3,
            "std": [0.25] * 3,
            "dtype": "float32",
            "dropout": 0.0,
            "unroll": "auto",
            "fast_derivatives": True,
            "step": step,
            "averaged": False,
            "params_sha256": predicted[step][1],
            "fdg_jax": fdg.__version__,
        }
    assert not np.allclose(predicted[3][0], predicted[5][0], atol=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == [kind]


@pytest.mark.parametrize("remedy", thinned(["none", "recipe"], keep=2))
def test_an_average_of_the_weights(tmp_path, remedy):
    folder = tmp_path / "run"
    run, state = begin(folder, model="tiny", remedy=remedy, average_decay=0.5)
    for _ in range(5):
        state, _ = run.pipe.step(state, (X, LABELS[:8]))
    save(folder, run, state, 5)
    found = {}
    for averaged in (False, True):
        name = tmp_path / f"model_{averaged}"
        export.export(str(folder), str(name), "safetensors", "last", False, averaged)
        params = run.pipe.averaged_params(state) if averaged else None
        found[averaged], about = predict(name)
        assert about["averaged"] == averaged
        x = data.normalise(IMAGES[:8], about["mean"], about["std"])
        expected = run.pipe.predict(state, x, params)
        np.testing.assert_allclose(found[averaged], expected, rtol=1e-5, atol=1e-6)
    assert np.any(found[False] != found[True])


def test_no_average_to_export(trained, tmp_path):
    with pytest.raises(UsageError, match=r"--averaged: the run in .* keeps no average"):
        export.export(str(trained[0]), str(tmp_path / "m"), "safetensors", "last", False, True)


@pytest.mark.parametrize("remedy", thinned(["none", "recipe"], keep=2))
def test_a_run_that_reconstructs_weights(tmp_path, remedy):
    # An average of the weight changes is in the optimizer's state, beside what the remedy keeps.
    folder = tmp_path / "run"
    run, state = begin(folder, model="tiny", method="pipemare", remedy=remedy)
    for _ in range(5):
        state, _ = run.pipe.step(state, (X, LABELS[:8]))
    expected, _ = save(folder, run, state, 5)
    export.export(str(folder), str(tmp_path / "model"), "safetensors", "last", False)
    outputs, _ = predict(tmp_path / "model")
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_scanned_layers(tmp_path):
    expected, _ = scattered(tmp_path / "run", model="tiny", unroll="no")
    export.export(str(tmp_path / "run"), str(tmp_path / "model"), "safetensors", "last", False)
    outputs, _ = predict(tmp_path / "model")
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_ordinary_modules_take_the_tree(trained, tmp_path):
    folder, predicted = trained
    paths = {kind: str(tmp_path / kind) for kind in model_file.FORMATS}
    for kind, path in paths.items():
        export.export(str(folder), path, kind, "last", False)
    tree = ocp.load(paths["orbax"] + "/arrays")
    flat = load_file(paths["safetensors"])
    names = traverse_util.flatten_dict(tree["params"], sep="/")
    names |= traverse_util.flatten_dict({"model_state": tree["model_state"]}, sep="/")
    assert names.keys() == flat.keys() >= {"layer_003/dense/kernel", "layer_005/bias"}
    assert "model_state/layer_000/batch_stats/BatchNorm_0/mean" in flat
    jax.tree.map(np.testing.assert_array_equal, names, flat)

    params, left = tree["params"], tree["model_state"]
    y = Linen().apply({"params": params["layer_000"], **left["layer_000"]}, X, train=False)
    for i in range(1, 5):
        module = Nnx(nnx.Rngs(i))
        for part in (params, left):
            nnx.update(module, part[f"layer_{i:03d}"])
        module.eval()
        y = module(y)
    head = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    nnx.update(head, params["layer_005"])
    np.testing.assert_allclose(head(y), predicted[5][0], rtol=1e-5, atol=1e-6)


@pytest.fixture
def copy(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained[0], tmp_path / "copy"))


def scored(folder, **scores):
    for step, score in scores.items():
        path = manifest.folder(folder / "checkpoints", int(step.removeprefix("s")))
        body = manifest.read(path)
        (path / manifest.NAME).unlink()
        manifest.write(path, {**body, "score": score})


def test_the_best_is_that_of_the_lowest_error(copy, capsys):
    with pytest.raises(
        UsageError, match=r"--checkpoint=best: none of 5, 3 in .* evaluated; choose"
    ):
        export.choose(str(copy), "best")
    scored(copy, s3=None, s5=0.5)
    assert export.choose(str(copy), "best").name == "step-000000005"
    scored(copy, s3=0.25)
    assert export.choose(str(copy), "best").name == "step-000000003"
    scored(copy, s3=0.5)
    assert export.choose(str(copy), "best").name == "step-000000005"
    scored(copy, s5=None)
    assert export.choose(str(copy), "best").name == "step-000000003"
    scored(copy, s5=0.125)
    (copy / "checkpoints" / "step-000000005" / "arrays" / "more").write_text("")
    assert export.choose(str(copy), "best").name == "step-000000003"
    assert (
        "step-000000005 is damaged (arrays/more is missing or was added)" in capsys.readouterr().err
    )


def cut(name):
    def damage(folder):
        for path in folder.glob(name):
            path.write_bytes(path.read_bytes()[:-1])

    return damage


def without(*names):
    def change(folder):
        path = folder / "config.json"
        there = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in there.items() if k not in names}))

    return change


def replaced(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (None, {"workdir": ""}, "--workdir: is missing"),
        (None, {"workdir": "nowhere"}, "--workdir=nowhere: its config.json cannot be read"),
        (
            lambda f: (f / "config.json").write_text("{"),
            {},
            "--workdir=.*: its config.json cannot be read",
        ),
        (lambda f: (f / "config.json").write_text("[]"), {}, "it is not that of a run"),
        (
            without("mean", "cuts"),
            {},
            "its config.json, of an older version, does not say mean, cut",
        ),
        (lambda f: shutil.rmtree(f / "checkpoints"), {}, "--workdir=.*: its run has no checkpoint"),
        (
            cut("*/step-000000005/manifest.json"),
            {},
            "--checkpoint=last: .*step-000000005 cannot be",
        ),
        (
            cut("*/step-*5/arrays/stage_2/manifest.ocdbt"),
            {"checkpoint": "5"},
            r"\(.*manifest\.ocdbt has changed",
        ),
        (None, {"checkpoint": "4"}, "--checkpoint=4: not in .*; choose last, best, or one of 5, 3"),
        (None, {"checkpoint": "-1"}, "--checkpoint=-1: not in"),
        (replaced(model="small_resnet"), {}, "--checkpoint=last: .* cannot be read"),
        (replaced(model="resnet7"), {}, "model='resnet7'"),
        (replaced(cuts=[9, 3]), {}, r"cost=\[9, 3\]"),
        (replaced(cuts=None), {}, "cannot be read"),
        (replaced(image_shape=8), {}, "cannot be read"),
        (replaced(dtype=["float32"]), {}, "cannot be read"),
        (None, {"output": ""}, "--output: is missing"),
        (
            None,
            {"output": "no/such/file"},
            r"--output=no/such/file: cannot be written \(there is no folder .*no/such\)",
        ),
        (None, {"output": __file__}, "is there already; name another"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(copy, tmp_path, change, flags, message):
    if change:
        change(copy)
    values = {"workdir": str(copy), "output": str(tmp_path / "out"), "checkpoint": "last"}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=message):
        export.export(**{"kind": "safetensors", "overwrite": False, **values, **flags})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", model_file.FORMATS)
def test_a_full_disk_leaves_what_was_there(copy, tmp_path, kind, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    export.export(str(copy), str(tmp_path / "out"), kind, "3", False)
    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    monkeypatch.setattr(manifest, "write", full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"--output=.*: cannot be written \(.*No space left"):
        export.export(str(copy), str(tmp_path / "out"), kind, "last", True)
    assert sorted(tmp_path.rglob("*")) == before
    assert model_file.load(tmp_path / "out")[2]["step"] == 3


def test_a_folder_that_is_no_model_is_not_replaced(copy):
    before = sorted(copy.rglob("*"))
    for output in (copy, copy / "checkpoints", copy / "checkpoints" / "step-000000005" / "arrays"):
        with pytest.raises(UsageError, match=r"--output=.*: is a folder, and no exported one"):
            export.place(str(output), True)
        with pytest.raises(UsageError, match=r"--output=.*: is there already; name another"):
            export.place(str(output), False)
    assert sorted(copy.rglob("*")) == before


def test_a_file_takes_the_place_of_a_folder_and_the_other_way_round(copy, tmp_path):
    for kind in ("orbax", "safetensors", "orbax"):
        export.export(str(copy), str(tmp_path / "out"), kind, "last", True)
        assert (tmp_path / "out").is_dir() == (kind == "orbax")
        assert model_file.load(tmp_path / "out")[2]["step"] == 5


def test_the_program(tmp_path):
    settings = {"model": "small_resnet", "partition": "1,3", "dtype": "bfloat16"}
    expected, sha = scattered(tmp_path / "run", **settings)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-m", "experiments.export", f"--workdir={tmp_path / 'run'}"]
    command += [f"--output={tmp_path / 'model.safetensors'}"]
    for status in (0, 2):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: --output=")
    assert done.stderr.count("\n") == 1
    outputs, about = predict(tmp_path / "model.safetensors")
    np.testing.assert_allclose(outputs, expected, rtol=2e-2, atol=2e-2)
    assert (about["dtype"], about["params_sha256"]) == ("bfloat16", sha)
