"""python -m experiments.cifar is killed, asked to stop, and goes on as if nothing had been."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from experiments.common import workdir
from experiments.common.errors import UsageError
from experiments.images.settings import Settings
from experiments.training import resume

ROOT = pathlib.Path(__file__).parents[3]
TIMES = ("images_per_second", "seconds")
STEPS, DEADLINE = 120, 120


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    """A folder of 8x8 images in two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 8)):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    return root


def start(images, workdir, *more: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "FDG_CACHE_DIR": str(ROOT / ".cache" / "experiments"),
        "JAX_PLATFORMS": "cpu",
    }
    arguments = [
        f"--dataset=folder:{images}",
        f"--workdir={workdir}",
        "--model=small_resnet",
        "--method=adl",
        "--partition=2",
        "--batch_size=8",
        f"--steps={STEPS}",
        "--eval_every_epochs=4",
        "--log_every_steps=3",
        "--crop_padding=1",
        "--checkpoint_every_steps=7",
        *more,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.cifar", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Status and output of a process that ends by itself before the deadline."""
    try:
        out, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    return process.returncode, out, errors


def lines(workdir: pathlib.Path) -> list[dict]:
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def wait_for(workdir: pathlib.Path, step: int, process: subprocess.Popen[str]) -> None:
    """Returns when the run has logged ``step``."""
    deadline = time.monotonic() + DEADLINE
    path = workdir / "metrics.jsonl"

    def reached() -> bool:
        whole = path.read_text().split("\n")[:-1] if path.exists() else []
        return any(json.loads(line)["step"] >= step for line in whole)

    while not reached():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate(timeout=DEADLINE))
        time.sleep(0.002)


def without_times(workdir: pathlib.Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(workdir)]


def content(workdir: pathlib.Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_a_run_that_was_killed_and_stopped_ends_as_an_undisturbed_one(images, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    status, _, errors = end(start(images, whole))
    assert status == 0, errors

    killed = start(images, run)
    wait_for(run, random.randint(15, 40), killed)
    killed.kill()
    assert end(killed)[0] == -signal.SIGKILL
    assert not (run / "summary.json").exists()

    asked = start(images, run)
    wait_for(run, 60, asked)
    asked.send_signal(signal.SIGTERM)
    status, out, errors = end(asked)
    assert status == 75, out + errors
    assert "goes on after step" in out
    (last,) = [line for line in out.splitlines() if line.startswith("stopped after step ")]
    assert last.endswith("; the same command goes on")
    stopped = int(last.split()[3].rstrip(";"))
    assert 60 <= stopped < STEPS

    # Damage to the newest checkpoint costs time, and nothing else.
    newest = max((run / "checkpoints").iterdir())
    assert newest.name == f"step-{stopped:09d}"
    (newest / "manifest.json").write_text("{")
    status, out, errors = end(start(images, run))
    assert status == 0, errors
    assert f"{newest.name} is damaged" in errors
    assert "goes on after step" in out

    assert without_times(run) == without_times(whole)
    seconds = [line["seconds"] for line in lines(run)]
    assert seconds == sorted(seconds)
    ours, theirs = (json.loads((d / "summary.json").read_text()) for d in (run, whole))
    for name in ("train_seconds", "images_per_second"):
        assert ours.pop(name) > 0
        del theirs[name]
    assert ours == theirs

    before = content(run)
    status, out, errors = end(start(images, run))
    assert (status, errors) == (0, "")
    assert "this run is finished" in out
    status, _, errors = end(start(images, run, "--beta=0.5"))
    assert status == 2
    assert errors.startswith("error: --beta=0.5: the run in ")
    assert "has beta=1.0" in errors
    assert content(run) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    config = Settings(str(tmp_path))
    assert resume.find(config) is None
    settings = {"workdir": "elsewhere", "cuts": [2], "balance": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    earlier = resume.find(config)
    assert earlier is not None
    assert not earlier.finished
    (tmp_path / "summary.json").write_text("{}")
    assert resume.find(config).finished
    assert resume.find(Settings(str(tmp_path), resume=False)) is None
    assert resume.find(Settings(str(tmp_path), overwrite=True)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not that of a run"),
        ("{}", "not that of a run"),
        ('{"cuts": [], "balance": 1, "seed": 3}', "--seed=0: the run in .* has seed=3; "),
        (
            '{"cuts": [], "balance": 1, "lr_milestones": [1.0, 2.5]}',
            "--lr_milestones=150,225,275: the run in .* has lr_milestones=1,2.5; ",
        ),
    ],
)
def test_what_is_there_and_does_not_fit_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        resume.find(Settings(str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert "--overwrite" in str(caught.value)


def test_checkpoints_without_settings_are_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for going_on in (True, False):
        with pytest.raises(UsageError, match="missing, but there are checkpoints"):
            resume.find(Settings(str(tmp_path), resume=going_on))
    (tmp_path / "checkpoints" / "step-000000001").mkdir()
    workdir.Workdir(str(tmp_path), overwrite=True, folders=[resume.FOLDER])
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    out = workdir.Workdir(str(tmp_path), overwrite=False)
    for step in range(4):
        out.append_metrics({"step": step})
    again = workdir.Workdir(str(tmp_path), overwrite=False, resume=True)
    again.cut_metrics(2)
    again.append_metrics({"step": 7})
    assert [line["step"] for line in again.metrics()] == [0, 1, 7]
    assert again.lines == 3
    with pytest.raises(UsageError, match="has 3 lines, the checkpoint was taken after 5"):
        again.cut_metrics(5)


def test_a_second_signal_is_not_held_back():
    # A shell's background jobs are started with SIGINT ignored.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        second_signal()
    finally:
        signal.signal(signal.SIGINT, kept)


def second_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with resume.Stop() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        assert signal.getsignal(signal.SIGTERM) is before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
