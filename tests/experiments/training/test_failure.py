"""What ends a run of experiments.cifar before its time says where, and loses nothing."""

import dataclasses
import json
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import fdg_jax as fdg
from experiments import data
from experiments.common.errors import Failed
from experiments.images.settings import Settings
from experiments.images.task import Images
from experiments.training import loop, resume
from tests.experiments.tiny import tiny_network

STEPS = 20


@pytest.fixture
def config(tmp_path, monkeypatch) -> Settings:
    """A run of 20 steps in 4 epochs, K = 3."""
    assert len(jax.devices()) == 4  # JAX is running: these tests need no devices of their own
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(fdg.models, "create", lambda name, *rest: tiny_network("tiny", *rest[:2]))
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for label in ("a", "b"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(folder / f"{i}.png")
    return Settings(
        str(tmp_path / "run"),
        dataset=f"folder:{tmp_path / 'images'}",
        model="tiny",
        num_stages=3,
        partition="2,4",
        batch_size=8,
        epochs=4,
        learning_rate=0.01,
        log_every_steps=3,
        crop_padding=1,
        checkpoint_every_steps=3,
        keep_checkpoints=100,
    )


def bad_images(monkeypatch, *steps: int) -> None:
    """The augmented images of these steps are NaN."""
    real = data.augment

    def augment(key, step, *rest, **options):
        spoilt = jnp.isin(step, jnp.asarray(steps))
        return jnp.where(spoilt, jnp.nan, real(key, step, *rest, **options))

    monkeypatch.setattr(data, "augment", augment)


def saved(config: Settings) -> list[int]:
    names = (pathlib.Path(config.workdir) / resume.FOLDER).iterdir()
    return sorted(int(path.name.removeprefix("step-")) for path in names)


def test_numbers_that_are_not_finite_stop_the_run(config, monkeypatch):
    bad_images(monkeypatch, 8)
    with pytest.raises(Failed) as caught:
        loop.run(config, Images)
    text = str(caught.value)
    assert text.startswith("mini-batch 8: output or model state of stage 0 (layers 0 to 1) is not")
    newest = max(saved(config))
    assert newest <= 8  # what came after batch 8 is not saved
    assert f"newest good checkpoint: step {newest}; " in text
    assert "--on_nonfinite=skip" in text
    # The same command stops again; asked to skip, the run goes on from there.
    with pytest.raises(Failed, match="mini-batch 8"):
        loop.run(config, Images)
    summary = loop.run(config_with(config, on_nonfinite="skip"), Images)
    assert summary["left_out"] == [1, 1, 1]
    assert np.isfinite(summary["test_loss"])

    # As a run that was to skip from the first.
    other = config_with(config, on_nonfinite="skip", workdir=config.workdir + "2")
    assert loop.run(other, Images)["params_sha256"] == summary["params_sha256"]


def config_with(config: Settings, **changes: object) -> Settings:
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("kind", ["dry", "broken"])
def test_data_that_end_or_cannot_be_read_end_the_run(config, monkeypatch, kind):
    real = data.Loader.__next__

    def give(loader):
        give.count += 1
        if give.count > 11:
            raise StopIteration if kind == "dry" else OSError("the disk is gone")
        return real(loader)

    give.count = 0
    monkeypatch.setattr(data.Loader, "__next__", give)
    threads = threading.active_count()
    with pytest.raises(Failed) as caught:
        loop.run(config, Images)
    what = {"dry": "the data ran dry", "broken": "the data cannot be read (the disk is gone)"}
    assert str(caught.value).startswith(f"step 11: {what[kind]}")
    assert str(caught.value).endswith(f"; newest good checkpoint: step {max(saved(config))}")
    assert threading.active_count() <= threads
    monkeypatch.setattr(data.Loader, "__next__", real)
    whole = config_with(config, workdir=config.workdir + "2")
    assert loop.run(config, Images)["params_sha256"] == loop.run(whole, Images)["params_sha256"]


def test_a_stage_that_fails_ends_the_run(config, monkeypatch):
    layers = tiny_network("tiny", 2)
    inner = layers[3]

    def check(x):
        if np.isnan(x).any():
            raise MemoryError("out of memory")
        return x

    def apply(params, state, x, *, train, key):
        still = jax.lax.stop_gradient(x)
        seen = jax.pure_callback(check, jax.ShapeDtypeStruct(x.shape, x.dtype), still)
        return inner.apply(params, state, x + 0 * jax.lax.stop_gradient(seen), train=train, key=key)

    layers[3] = fdg.Layer(inner.init, apply)
    monkeypatch.setattr(fdg.models, "create", lambda *_: layers)
    bad_images(monkeypatch, 8)
    with pytest.raises(Failed) as caught:
        loop.run(config_with(config, on_nonfinite="skip"), Images)
    assert str(caught.value).startswith("stage 1 (layers 2 to 3), mini-batch 8, F: ")
    assert "out of memory" in str(caught.value)
    assert "newest good checkpoint: step " in str(caught.value)


def test_the_best_and_the_last_checkpoint_stay(config):
    summary = loop.run(config_with(config, keep_checkpoints=1), Images)
    lines = pathlib.Path(config.workdir, "metrics.jsonl").read_text().splitlines()
    tests = [line for line in map(json.loads, lines) if line["split"] == "test"]
    best = min(tests, key=lambda line: line["error"])
    assert saved(config) == sorted({best["step"], STEPS})
    assert best["error"] == summary["best_test_error"]


def test_a_run_that_was_killed_after_its_last_checkpoint_only_writes_its_results(config):
    first = loop.run(config, Images)
    folder = pathlib.Path(config.workdir)
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "summary.json").unlink()
    assert loop.run(config, Images) == first
    assert (folder / "metrics.jsonl").read_text() == metrics


def test_no_checkpoints_where_none_are_wanted(config):
    loop.run(config_with(config, checkpoint_every_steps=0, checkpoint_every_minutes=0), Images)
    assert not (pathlib.Path(config.workdir) / resume.FOLDER).exists()
