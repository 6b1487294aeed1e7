"""python -m experiments.advise: a model of one's own from end to end, and how it refuses."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from experiments import advise
from experiments.benchmarking.model import Sizes, load
from experiments.common.errors import UsageError

ROOT = pathlib.Path(__file__).parents[2]
MODULE = """
import numpy as np

from tests import networks

layers = [networks.dense(6), networks.batch_norm(), networks.dense(3)]
batch = np.ones((8, 4), np.float32), np.zeros(8, np.int32)


def make():
    return layers, batch, networks.loss_fn


def without_loss():
    return layers, (batch[0], None)


def fails():
    raise RuntimeError("no data here")


def lists():
    return [layers, batch]


def one_array():
    return layers, batch[0]


def no_layers():
    return [len], batch


def misfit():
    return [networks.dense(6), networks.fdg.from_fn(lambda x: x @ np.ones((5, 5)))], batch


def no_loss():
    return layers, batch, 3


def numbers():
    return layers, (batch[0], 7)


a_number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "its_model.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("its_model", None)


def run(folder, *arguments: str) -> subprocess.CompletedProcess[str]:
    cache = ROOT / ".cache" / "experiments"
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "experiments.advise", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "FDG_CACHE_DIR": str(cache),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": paths,
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_a_model_of_ones_own(folder):
    out = folder / "run"
    arguments = ("--model=its_model:make", "--seconds=0", f"--workdir={out}", "--measure")
    done = run(folder, *arguments, "--rounds=2", "--turn_seconds=0.01")
    assert done.returncode == 0, done.stderr
    written = json.loads((out / "advise.json").read_text())
    found = [(row["method"], row["devices"]) for row in written["rows"]]
    both = ("backprop", "data_parallel", "one_f_one_b", "ddg", "fdg")
    assert found == [("backprop", 1), *((name, 2) for name in both)]
    assert [len(row["bytes"]) for row in written["rows"]] == [1, 2, 1, 2, 2, 2]
    assert written["rows"][-1]["staleness"] == [2, 0]
    assert written["recommendation"] in done.stdout
    assert written["flags"]["model"] == "its_model:make"
    assert "measuring 3 layers on 2 devices" in done.stdout
    assert "Milliseconds of a layer, 2 devices at work:" in done.stdout
    # Each row was trained with, in both rounds.
    compared = written["comparison"]
    assert [(one["method"], one["devices"]) for one in compared] == found
    for row, one in zip(written["rows"], compared, strict=True):
        assert len(one["measured"]) == 2
        assert min(one["measured"]) > 0
        assert one["predicted"] == row["throughput"]
        assert one["ratio"] == pytest.approx(one["predicted"] / one["median"])
    assert "of 6 predictions are within 10 %" in done.stdout
    # A second time only if told so.
    again = run(folder, *arguments)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


@pytest.mark.parametrize("model", ["nothing", "its_model:fails", "no_such_module:make"])
def test_exit_status(folder, model):
    done = run(folder, f"--model={model}", f"--workdir={folder / 'run'}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --model={model}: " if ":" in model else "error: --model")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (folder / "run").exists()


def test_a_network_that_does_not_fit_together_is_one_line(folder):
    done = run(folder, "--model=its_model:misfit", "--seconds=0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model=its_model:misfit: layer 1: fails on")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "--model: model='nothing': allowed are resnet20"),
        ("nothing", "or transformer, or module:function"),
        ("its_model:", "is no module:function; give one such as my_model:make"),
        ("a b:make", "is no module:function"),
        ("no_such_module:make", "no_such_module cannot be imported (ModuleNotFoundError"),
        ("its_model:nothing", "its_model has no nothing; name a function of it"),
        ("its_model:a_number", "its_model has int, no function, a_number"),
        ("its_model:fails", "called without arguments: RuntimeError: no data here; return (layers"),
        ("its_model:lists", "the function returns list of 2; return (layers"),
        ("its_model:one_array", "its batch is ndarray; return (layers"),
        ("its_model:no_layers", "layers[0]: a function is no layer"),
        ("its_model:no_loss", "its loss is int, no function"),
        ("its_model:numbers", "its batch holds int; give arrays"),
    ],
)
def test_models_that_are_refused(folder, model, message):
    with pytest.raises(UsageError) as caught:
        load(model, Sizes())
    assert message in str(caught.value)


def test_models_by_name(folder):
    assert load("its_model:without_loss", Sizes()).loss_fn is None
    images = load("plain16", Sizes(batch_size=3, image_size=8))
    assert images.batch[0].shape == (3, 8, 8, 3)
    assert images.batch[1].shape == (3,)
    text = load("transformer", Sizes(batch_size=2, width=8, blocks=3, heads=2, context=5))
    assert [leaf.shape for leaf in text.batch] == [(2, 5), (2, 5)]
    assert sum(layer.size for layer in text.layers) == 5
    with pytest.raises(UsageError, match="--heads=3: does not divide --width=8"):
        load("transformer", Sizes(width=8, heads=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model: is missing"),
        (["--model=a:b", "--image_size=8"], "--image_size=8: is for the project's own models"),
        (["--model=plain16", "--seconds=nan"], "--seconds=nan: must be finite"),
        (["--model=plain16", "--turn_seconds=0"], "--turn_seconds=0.0: must be finite, and 1e-09"),
        (["--model=plain16", "--workdir=README.md"], "--workdir=README.md: cannot be written"),
    ],
)
def test_flags_that_are_refused(monkeypatch, arguments, message):
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(advise, "FLAGS", values)
    advise.define_flags(values)
    values(["advise", *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError) as caught:
        advise.check()
    assert message in str(caught.value)


def test_more_devices_than_there_are(folder):
    done = run(folder, "--model=its_model:make", "--num_stages=4000")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --num_stages=4000: there are ")
    assert done.stderr.count("\n") == 1
