"""python -m experiments.staleness: what it trains, what it counts, what it refuses."""

import dataclasses
import json
import math
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from experiments import staleness
from experiments.common.errors import UsageError
from experiments.comparing import overhead, study

ROOT = pathlib.Path(__file__).parents[2]
TEXT = """
title = "A study"
program = "lm"
metric = "loss"
seeds = [0, 1]
flags = ["--steps=100", "--warmup_steps=4", "--eval_every_steps=25"]

[[rows]]
name = "backprop"
flags = ["--method=backprop", "--num_stages=1"]

[[rows]]
name = "FDG, K = 2"
series = "FDG"
baseline = "backprop"
flags = ["--num_stages=2", "--remedy=recipe"]
"""


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    file = tmp_path / "study.toml"
    file.write_text(TEXT)
    return file


def write(run: study.Run, losses: list[float]) -> None:
    """A made-up finished run, evaluated every 25 steps."""
    folder = pathlib.Path(run.settings.workdir)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(run.settings)))
    points = [
        {"step": 25 * (i + 1), "split": "validation", "loss": loss, "error": 0.5}
        for i, loss in enumerate(losses)
    ]
    train = {"step": 1, "split": "train", "loss": 0.0, "error": 0.0}
    text = "".join(json.dumps(point) + "\n" for point in [train, *points])
    (folder / "metrics.jsonl").write_text(text)
    summary = {
        "stages": run.settings.num_stages,
        "staleness": [0],
        "params_sha256": "0",
        "train_seconds": 1.0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def test_rows_and_seeds_make_the_runs(path, tmp_path):
    runs = study.read(str(path)).runs(str(tmp_path / "out"))
    assert [(run.row.name, run.seed) for run in runs] == [
        ("backprop", 0),
        ("FDG, K = 2", 0),
        ("backprop", 1),
        ("FDG, K = 2", 1),
    ]
    assert runs[3].settings.workdir == str(tmp_path / "out" / "fdg_k_2_seed1")
    assert (runs[3].settings.steps, runs[3].settings.remedy) == (100, "recipe")
    assert runs[3].command[1:3] == ["-m", "experiments.lm"]
    extra = study.with_flags(study.read(str(path)), ["--steps=200"])
    assert extra.runs("x")[0].settings.steps == 200


def test_a_grid_makes_a_row_of_every_combination(path):
    grid = 'grid = [["--learning_rate=1 --momentum=0.5", "--learning_rate=2"], '
    grid += '["--heads=1", "--heads=2"]]'
    path.write_text(TEXT + grid)
    rows = study.read(str(path)).rows
    assert [row.name for row in rows[1:]] == [
        "FDG, K = 2, learning_rate=1 momentum=0.5 heads=1",
        "FDG, K = 2, learning_rate=1 momentum=0.5 heads=2",
        "FDG, K = 2, learning_rate=2 heads=1",
        "FDG, K = 2, learning_rate=2 heads=2",
    ]
    assert rows[2].flags[-3:] == ("--learning_rate=1", "--momentum=0.5", "--heads=2")
    assert rows[2].flags[:-3] == rows[4].flags[:-2]


def test_the_overhead_by_hand(path, tmp_path, capsys):
    found = study.read(str(path))
    folder = tmp_path / "out"
    values = {
        # Halfway, at step 50: 3.0. FDG is there between the steps 75 and 100, at 87.5.
        ("backprop", 0): [4.0, 3.0, 2.5, 2.0],
        ("FDG, K = 2", 0): [5.0, 4.0, 3.5, 2.5],
        # It is never at 1.0.
        ("backprop", 1): [2.0, 1.0, 0.9, 0.8],
        ("FDG, K = 2", 1): [5.0, 4.0, 3.0, 2.0],
    }
    for run in found.runs(str(folder)):
        write(run, values[run.row.name, run.seed])
    assert staleness.run_study(found, folder, 1, 0.5, report_only=True) == 0
    backprop, fdg = json.loads((folder / "results.json").read_text())["rows"]
    assert backprop["overhead"] == [1.0, 1.0]
    assert fdg["overhead"] == [87.5 / 50, None]
    assert fdg["gap"] == pytest.approx([0.5, 1.2])
    assert fdg["last"] == [2.5, 2.0]
    table = (folder / "table.md").read_text()
    assert "| FDG, K = 2 | 2 | 0 | 2 | 2.250 ± 0.354 | 0.850 ± 0.495 | 1.75 (1 of 2 not" in table
    assert "4 runs finished, 0 remaining" in capsys.readouterr().out
    with Image.open(folder / "staleness.png") as picture:
        assert picture.width > 1000


def test_what_is_missing_is_trained_and_goes_on_where_it_was_interrupted(path, tmp_path, capsys):
    tiny = ["--steps=8", "--warmup_steps=1", "--width=8", "--heads=2", "--blocks=1", "--context=8"]
    source = tmp_path / "text"
    source.write_bytes(bytes(range(65, 90)) * 100)
    tiny += ["--batch_size=2", "--eval_every_steps=4", f"--dataset=file:{source}"]
    found = study.with_flags(study.read(str(path)), tiny)
    folder = tmp_path / "out"
    runs = found.runs(str(folder))
    for run in runs[2:]:
        write(run, [2.0, 1.0])
    # A run that was interrupted has no summary.
    pathlib.Path(runs[0].settings.workdir).mkdir(parents=True)
    assert staleness.run_study(found, folder, 2, 0.5, report_only=False) == 0
    out = capsys.readouterr().out
    assert "2 runs finished, 2 remaining" in out
    assert "2/2  " in out
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["seeds"] for row in rows] == [[0, 1], [0, 1]]
    assert all(math.isfinite(row["last"][0]) for row in rows)


def test_a_failed_run_is_told_and_the_others_go_on(path, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("too short")
    found = study.with_flags(study.read(str(path)), [f"--dataset=file:{text}"])
    assert staleness.run_study(found, tmp_path / "out", 2, 0.5, report_only=False) == 1
    captured = capsys.readouterr()
    assert captured.out.count("FAILED with status 2") == 4
    assert "--context=64: " in captured.out
    assert "4 failed: " in captured.err


def test_a_run_with_other_settings_is_refused(path, tmp_path):
    found = study.read(str(path))
    for run in found.runs(str(tmp_path / "out")):
        write(run, [1.0])
    other = study.with_flags(found, ["--learning_rate=0.5"])
    with pytest.raises(UsageError, match=r"was run with --learning_rate=0.002, not .*=0.5"):
        staleness.run_study(other, tmp_path / "out", 1, 0.5, report_only=True)


def test_curves():
    points = [(10, 4.0), (20, 2.0), (30, 3.0)]
    assert [overhead.value_at(points, step) for step in (5, 10, 12, 25, 99)] == [4, 4, 3.6, 2.5, 3]
    assert overhead.steps_to(points, 5.0) == 10
    assert overhead.steps_to(points, 2.0) == 20
    assert overhead.steps_to(points, 1.9) == math.inf
    # What was not finite lies above everything.
    broken = overhead.curve(
        [
            {"step": 10, "split": "test", "loss": None},
            {"step": 15, "split": "train", "loss": 0.0},
            {"step": 20, "split": "test", "loss": 2.0},
        ],
        "loss",
    )
    assert broken == [(10, math.inf), (20, 2.0)]
    assert overhead.steps_to(broken, 3.0) == 20


def test_a_run_whose_loss_is_not_finite_is_told(path, tmp_path):
    found = study.read(str(path))
    for run in found.runs(str(tmp_path / "out")):
        losses = [4.0, 3.0] if run.row.name == "backprop" else [4.0, None]
        write(run, losses)
    assert staleness.run_study(found, tmp_path / "out", 1, 0.5, report_only=True) == 0
    _, row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["last"] == [None, None]
    assert "| not finite | not finite | " in (tmp_path / "out" / "table.md").read_text()


def test_a_target_before_the_first_evaluation_is_refused(path, tmp_path):
    found = study.read(str(path))
    for run in found.runs(str(tmp_path / "out")):
        write(run, [4.0, 3.0, 2.0])
    with pytest.raises(UsageError, match=r"--fraction=0\.1: of the 75 steps of 'backprop' lies"):
        staleness.run_study(found, tmp_path / "out", 1, 0.1, report_only=True)


def test_a_study_that_is_stopped_leaves_no_run_behind(path, tmp_path):
    source = tmp_path / "text"
    source.write_bytes(bytes(range(65, 90)) * 400)
    path.write_text(path.read_text().replace("--steps=100", "--steps=100000"))
    command = [sys.executable, "-m", "experiments.staleness", f"--study={path}"]
    command += [f"--workdir={tmp_path / 'out'}", f"--extra=--dataset=file:{source}"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    metrics = tmp_path / "out" / "backprop_seed0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0].startswith("0 runs finished, 4 remaining")
    assert process.returncode == 143
    size = metrics.stat().st_size
    time.sleep(1)
    assert metrics.stat().st_size == size


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('program = "lm"', 'program = "gan"', "program='gan': allowed are cifar, lm"),
        ('metric = "loss"', 'metric = "bleu"', "metric='bleu': allowed are loss, error"),
        ("seeds = [0, 1]", "seeds = []", r"seeds=\[\]: give at least one"),
        ("seeds = [0, 1]", "seeds = [-1]", r"seeds=\[-1\]: give"),
        ("seeds = [0, 1]", "seeds = [1, 1]", r"seeds=\[1, 1\]: give each once"),
        ('"--remedy=recipe"', '"--seed=3"', "row 'FDG, K = 2': --seed: the study gives it"),
        ('"--steps=100"', '"--workdir=x"', "row 'backprop': --workdir: the study gives it"),
        ("seeds = [0, 1]", "", "'seeds' in the study: is missing"),
        ('title = "A study"', "titel = 1", "'titel' in the study: is not known"),
        ('title = "A study"', "title = 1", "title=1 in the study: must be a str"),
        ('name = "FDG, K = 2"', 'name = "Backprop!"', "row 'backprop': is there twice, or nearly"),
        ('baseline = "backprop"', 'baseline = "sgd"', "baseline='sgd': is no row; there are back"),
        ('"--remedy=recipe"', '"--remedy=all"', "row 'FDG, K = 2': --remedy=all: no such choice"),
        ('"--remedy=recipe"', '"--remdy=all"', "row 'FDG, K = 2': .*remdy"),
        ('"--remedy=recipe"', '"oops"', "row 'FDG, K = 2': oops: not a flag"),
        ('title = "A study"', "title = ", "cannot be read"),
        (
            'name = "backprop"',
            'name = "backprop"\ngrid = ["--momentum=0"]',
            "grid of row 'backprop': '--momentum=",
        ),
    ],
)
def test_bad_studies_are_named(path, old, new, message):
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(UsageError, match=f"^--study=?.*: {message}"):
        study.read(str(path)).runs("out")


def test_a_study_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"^--study=.*none.toml: cannot be read"):
        study.read(str(tmp_path / "none.toml"))
