"""measured: times of layers are taken once, and every later run has the same cuts."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdg_jax as fdg
from experiments.images.settings import Settings
from experiments.images.task import Images
from experiments.training import measured, setup

ROOT = pathlib.Path(__file__).parents[3]
LAYERS = fdg.models.create("small_resnet")
NETWORK = {"model": "small_resnet", "num_classes": 10}


def images(batch=4):
    return jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """Keeps the cache inside tmp_path."""
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "layer_times"


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes measured, one entry a measurement; the times are made up and never the same."""
    shapes: list[tuple[int, ...]] = []
    rng = np.random.default_rng(0)

    def layer_costs(units, example, cost):
        assert cost == "time"
        shapes.append(example.shape)
        return list(rng.uniform(0.1, 1, len(units)))

    monkeypatch.setattr(measured, "layer_costs", layer_costs)
    return shapes


def test_the_second_time_nothing_is_measured(taken, folder):
    first = measured.times(LAYERS, images(), NETWORK)
    second = measured.times(LAYERS, images(), NETWORK)
    assert len(taken) == 1
    assert second.seconds == first.seconds
    assert type(first.seconds) is type(second.seconds) is list
    assert all(type(value) is float for value in first.seconds + second.seconds)
    assert first.note == "measured 5 layers in 0.0 s"
    (path,) = folder.iterdir()
    assert second.note == f"times of 5 layers measured before, {path}"
    assert path.name.startswith("small_resnet-")
    assert path == measured.file(measured.key(images(), NETWORK))


def test_the_times_are_those_of_the_layers():
    seconds, _ = measured.times(LAYERS, images(), NETWORK)
    assert len(seconds) == 5
    assert all(0 < value < 10 for value in seconds)


DAMAGE = {
    "empty": lambda text: "",
    "truncated": lambda text: text[:-20],
    "no UTF-8": lambda text: b"\xff" + text.encode(),
    "a list": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
    "no times": lambda text: json.dumps({"key": json.loads(text)["key"]}),
    "too few": lambda text: _with(text, [1.0]),
    "zero": lambda text: _with(text, [0.0] * 5),
    "negative": lambda text: _with(text, [1.0, 1.0, -1.0, 1.0, 1.0]),
    "NaN": lambda text: _with(text, [float("nan")] * 5),
    "huge": lambda text: _with(text, [10**400] * 5),
    "words": lambda text: _with(text, ["fast"] * 5),
    "of something else": lambda text: json.dumps({**json.loads(text), "key": {}}),
}


def _with(text, seconds):
    return json.dumps({**json.loads(text), "seconds": seconds})


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_measured_anew(damage, taken, folder, caplog):
    measured.times(LAYERS, images(), NETWORK)
    (path,) = folder.iterdir()
    damaged = DAMAGE[damage](path.read_text())
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with caplog.at_level(logging.WARNING):
        again = measured.times(LAYERS, images(), NETWORK)
    assert str(path) in caplog.text
    assert len(taken) == 2
    assert measured.times(LAYERS, images(), NETWORK).seconds == again.seconds
    assert len(taken) == 2


@pytest.mark.parametrize("obstacle", ["file for a folder", "folder for the file"])
def test_without_a_writable_cache_it_goes_on(obstacle, taken, folder, caplog):
    if obstacle == "file for a folder":
        folder.parent.write_text("mine")
    else:
        measured.file(measured.key(images(), NETWORK)).mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert len(measured.times(LAYERS, images(), NETWORK).seconds) == 5
    assert "not cached" in caplog.text
    assert not list(folder.parent.rglob("*.tmp"))


def test_the_key_is_of_everything_that_the_times_depend_on(monkeypatch):
    keys = [measured.key(images(), NETWORK)]
    assert measured.key(images(), dict(reversed(NETWORK.items()))) == keys[0]
    keys.append(measured.key(images(batch=8), NETWORK))
    keys.append(measured.key(jax.ShapeDtypeStruct((4, 8, 9, 3), jnp.float32), NETWORK))
    keys.append(measured.key(jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.bfloat16), NETWORK))
    keys.append(measured.key(images(), {**NETWORK, "model": "resnet20"}))
    keys.append(measured.key(images(), {**NETWORK, "num_classes": 100}))
    for module, name, value in (
        (jax, "__version__", "99"),
        (fdg, "__version__", "99"),
        (measured, "cores", lambda: 99),
        (measured, "_processor", lambda: "abacus"),
        (measured, "_source", lambda: "0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            keys.append(measured.key(images(), NETWORK))
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        keys.append(measured.key(images(), NETWORK))
    assert len({measured.file(key) for key in keys}) == len(keys) == 12


def task(**values) -> Images:
    """On 20 of the images that come with the package."""
    return Images(Settings("nowhere", batch_size=16, train_size=20, **values))


def test_cuts_follow_from_the_times_and_repeat(taken):
    stages, times = setup.split(task(num_stages=3), 1)
    assert stages.layer_costs == tuple(times.seconds)
    assert stages.unit == "seconds"
    again, _ = setup.split(task(num_stages=3), 1)
    assert (again.cuts, again.layer_costs) == (stages.cuts, stages.layer_costs)
    # Another number of stages is another sum of the same times.
    two, _ = setup.split(task(num_stages=2), 1)
    assert two.layer_costs == stages.layer_costs
    assert taken == [(16, 28, 28, 1)]


def test_a_micro_batch_is_what_is_measured(taken):
    setup.split(task(method="gpipe"), 4)
    assert taken == [(4, 28, 28, 1)]


@pytest.mark.parametrize(
    "values",
    [
        {"num_stages": 1, "method": "backprop"},
        {"method": "data_parallel"},
        {"partition": "flops"},
        {"partition": "2"},
    ],
)
def test_what_needs_no_times_measures_none(values, taken):
    stages, times = setup.split(task(**values), 1)
    assert times is None
    assert stages.unit == "FLOPs"
    assert not taken


@pytest.mark.slow
def test_the_command_line_measures_by_default(tmp_path):
    """The compiled programs are kept between runs; the times are this test's own."""
    arguments = ["--model=small_resnet", "--batch_size=16", "--train_size=80", "--steps=2"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "experiments" / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cifar", *arguments, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "partition: measured 5 layers in " in done.stdout
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (recorded["partition"], recorded["cost_unit"]) == ("time", "seconds")
    (path,) = (tmp_path / "cache" / "layer_times").iterdir()
    times = json.loads(path.read_text())
    assert recorded["layer_costs"] == times["seconds"]
    assert times["key"]["inputs"] == [[[16, 28, 28, 1], "float32"]]
    assert fdg.partition(LAYERS, 2, images(), cost=times["seconds"]).cuts == (*recorded["cuts"],)
