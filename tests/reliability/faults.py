"""Injects faults and reports the outcome of each.

    python -m tests.reliability.faults --output=faults.md     # a table, some minutes

Every function below causes one fault, fails unless it is detected and named, and returns the
message. The tests call the same functions.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

import fdg_jax as fdg
from fdg_jax.checkpoint import Checkpointer
from tests import networks
from tests.checkpoint.test_checkpointer import make, train
from tests.engine import failing
from tests.reliability import damage

ROOT = pathlib.Path(__file__).parents[2]
DEADLINE = 300
FULL = "No space left on device"


def two_checkpoints(folder: pathlib.Path) -> fdg.Pipeline:
    """Saves checkpoints of steps 3 and 5, with the step as extra; returns their pipeline."""
    import jax

    pipe, data = make(), networks.batches(5)
    state = train(pipe, pipe.init(jax.random.key(7), data[0][0]), data[:3], [])
    with Checkpointer(folder, pipe) as checkpoints:
        checkpoints.save(state, 3, 3)
        checkpoints.save(train(pipe, state, data[3:], []), 5, 5)
    return pipe


def restored(pipe: fdg.Pipeline, folder: pathlib.Path) -> tuple[int, list[str]]:
    """The step of the restored checkpoint, and the warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state, extra = Checkpointer(folder, pipe).restore(networks.batches(1)[0])
    assert state.tick == extra
    return extra, [str(warning.message) for warning in said]


def damaged(pipe: fdg.Pipeline, folder: pathlib.Path, harm: damage.Damage) -> str:
    """Damages the newest of two checkpoints: it is named, and the older one is used."""
    harm(folder / "step-000000005")
    step, said = restored(pipe, folder)
    assert step == 3, said
    (line,) = said
    assert "\n" not in line
    assert f"{folder / 'step-000000005'} is damaged (" in line
    assert line.endswith(") and passed over")
    return line.partition("is damaged (")[2].removesuffix(") and passed over")


def half_written(pipe: fdg.Pipeline, folder: pathlib.Path) -> str:
    """The remains of a killed save are not used as a checkpoint."""
    (folder / "step-000000005").rename(folder / ".step-000000007")
    step, said = restored(pipe, folder)
    assert (step, said) == (3, [])
    return "not taken for a checkpoint; step 3 used, nothing lost"


def all_damaged(pipe: fdg.Pipeline, folder: pathlib.Path) -> str:
    """If no checkpoint is intact, the error is one line."""
    for path in folder.glob("step-*/manifest.json"):
        damage.flip(path)
    with pytest.raises(ValueError, match=r"none of the .* is whole") as caught:
        restored(pipe, folder)
    line = str(caught.value)
    assert "\n" not in line
    return line.rpartition(": ")[2]


def make_images(root: pathlib.Path) -> pathlib.Path:
    """A folder of 8x8 images in two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


def cifar(
    images: pathlib.Path, workdir: pathlib.Path, *more: str, within: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """A short run, optionally within another command, such as one that provides a small disk."""
    arguments = [
        f"--dataset=folder:{images}",
        f"--workdir={workdir}",
        "--partition=2",
        "--batch_size=8",
        "--steps=30",
        "--eval_every_epochs=2",
        "--log_every_steps=3",
        "--crop_padding=1",
        "--checkpoint_every_steps=10",
        *more,
    ]
    cache = str(ROOT / ".cache" / "experiments")
    return subprocess.run(
        [*within, sys.executable, "-m", "experiments.cifar", *arguments],
        cwd=ROOT,
        env={**os.environ, "FDG_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def disk(point: pathlib.Path, size: int, copy: pathlib.Path) -> tuple[str, ...]:
    """A command prefix that mounts a disk of ``size`` bytes at ``point`` and copies it at the
    end."""
    point.mkdir(parents=True)
    script = (
        'mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99; point=$2; copy=$3; shift 3; "$@"; '
        'status=$?; cp -r "$point" "$copy"; exit $status'
    )
    return ("unshare", "-Urm", "sh", "-c", script, "sh", str(size), str(point), str(copy))


def small_disks() -> bool:
    """Whether this machine allows programs to mount a disk."""
    with tempfile.TemporaryDirectory() as folder:
        command = disk(pathlib.Path(folder) / "disk", 4096, pathlib.Path(folder) / "copy")
        try:
            done = subprocess.run([*command, "true"], capture_output=True, timeout=60, check=False)
        except OSError:
            return False
    return done.returncode == 0


def sha(workdir: pathlib.Path) -> str:
    return str(json.loads((workdir / "summary.json").read_text())["params_sha256"])


def whole_run(images: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """An undisturbed run."""
    done = cifar(images, folder / "whole")
    assert done.returncode == 0, done.stderr
    return folder / "whole"


def full_while_saving(images: pathlib.Path, whole: pathlib.Path, folder: pathlib.Path) -> str:
    """No space for a second checkpoint: the run continues and ends as on a large disk."""
    # Space for one checkpoint, but not for a second one.
    sizes = [
        sum(path.stat().st_blocks * 512 for path in step.rglob("*"))
        for step in (whole / "checkpoints").glob("step-*")
    ]
    within = disk(folder / "disk", int(1.6 * max(sizes)), folder / "copy")
    done = cifar(images, folder / "disk" / "run", within=within)
    run = folder / "copy" / "run"
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "could not be written" in line]
    assert lines
    assert all(FULL in line for line in lines), lines
    assert "Traceback" not in done.stderr, done.stderr
    assert sha(run) == sha(whole)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step-000000010"], left
    return f"{len(lines)} warnings; the run ends with the undisturbed parameters; {left[0]} whole"


def full_at_the_end(images: pathlib.Path, whole: pathlib.Path, folder: pathlib.Path) -> str:
    """No space for the run's own files: one error line, and no partial file."""
    within = disk(folder / "disk", 5 * 4096, folder / "copy")
    done = cifar(images, folder / "disk" / "run", "--checkpoint_every_steps=0", within=within)
    assert done.returncode == 2, done.stderr
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: --workdir=")
    assert FULL in line
    assert "Traceback" not in done.stderr, done.stderr
    left = sorted(path.name for path in (folder / "copy" / "run").iterdir())
    assert "summary.json" not in left
    assert not any(name.startswith(".") for name in left), left
    return line.removeprefix("error: ").replace(str(folder), "")


def refused(done: subprocess.CompletedProcess[str], folder: pathlib.Path) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ").replace(f"{folder}/", "")


def image_unreadable(images: pathlib.Path, whole: pathlib.Path, folder: pathlib.Path) -> str:
    """An image without read permission, for a program without root privileges."""
    own = pathlib.Path(shutil.copytree(images, folder / "images"))  # not decoded before
    path = own / "train" / "a" / "3.png"
    path.chmod(0)
    try:
        done = cifar(own, folder / "run", within=("unshare", "-U"))
    finally:
        path.chmod(0o644)
    assert not (folder / "run").exists()
    return refused(done, folder)


def data_gone(images: pathlib.Path, whole: pathlib.Path, folder: pathlib.Path) -> str:
    """A run is resumed after its data set was removed."""
    run = pathlib.Path(shutil.copytree(whole, folder / "run"))
    (run / "summary.json").unlink()
    before = sorted(run.rglob("*"))
    away = images.rename(folder / "away")
    try:
        line = refused(cifar(images, run), folder)
    finally:
        away.rename(images)
    assert sorted(run.rglob("*")) == before
    return line


CHECKPOINTS = {
    "a save killed half-way": half_written,
    "all checkpoints damaged": all_damaged,
}
STAGES: dict[str, Callable[[], object]] = {
    "NaN in a batch, on_nonfinite=stop": lambda: failing.nan_in_a_batch("stop"),
    "NaN in a batch, on_nonfinite=skip": lambda: failing.nan_in_a_batch("skip"),
    "an error raised in stage 1 of 3": lambda: failing.error_in_stage_1(fdg.schedule.fdg(3)),
}
RUNS = {
    "disk full while a checkpoint is written": full_while_saving,
    "disk full where the run's own files are to be written": full_at_the_end,
    "an image that may not be read": image_unreadable,
    "a data set that has gone": data_gone,
}


def rows() -> list[tuple[str, str]]:
    """Every fault and its message."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        pipe = two_checkpoints(folder / "two")

        def fresh() -> pathlib.Path:
            shutil.rmtree(folder / "here", ignore_errors=True)
            return pathlib.Path(shutil.copytree(folder / "two", folder / "here"))

        for fault, harm in {**damage.ACCIDENTS, **damage.STRANGERS}.items():
            found.append((fault, f"step 3 used: {damaged(pipe, fresh(), harm)}"))
        for fault, check in CHECKPOINTS.items():
            found.append((fault, check(pipe, fresh())))
        for fault, run_stages in STAGES.items():
            found.append((fault, " ".join(str(run_stages()).split())))
        images = make_images(folder / "images")
        whole = whole_run(images, folder)
        for i, (fault, run) in enumerate(RUNS.items()):
            (folder / str(i)).mkdir()
            found.append((fault, run(images, whole, folder / str(i))))
        return [(fault, _cell(said.replace(f"{folder}/", ""))) for fault, said in found]


def _cell(said: str) -> str:
    """A message as a table cell, shortened and without random names."""
    text = re.sub("[0-9a-f]{32}", "...", said).replace("|", "/")
    return text if len(text) < 160 else text[:160] + " ..."


def main() -> None:
    parser = argparse.ArgumentParser(description="Injects faults and writes a table.")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a Markdown file")
    output = parser.parse_args().output
    table = ["| fault | what came of it |", "| --- | --- |"]
    table += [f"| {fault} | {said} |" for fault, said in rows()]
    output.write_text("\n".join(table) + "\n")
    print(f"{len(table) - 2} faults, all found; {output}")


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  # float64 and four devices, as in the tests

    main()
