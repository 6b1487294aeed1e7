"""python -m experiments.cifar: what it writes, that it repeats, and how it refuses."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

from experiments.common.errors import Stopped
from experiments.images import settings
from experiments.images.task import Images
from experiments.training import loop, methods, setup
from tests.thinned import thinned

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    """A folder of 8x8 images in two classes that differ in brightness."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for label, level in (("dark", 60), ("light", 180)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 50, level + 50, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def cache() -> pathlib.Path:
    """Kept between runs: compiling takes most of the time of these tests."""
    return ROOT / ".cache" / "experiments"


def cifar(cache, *arguments: str, program: str = "cifar") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FDG_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def small(images, workdir) -> list[str]:
    return [
        f"--dataset=folder:{images}",
        f"--workdir={workdir}",
        "--model=small_resnet",
        "--partition=2",
        "--batch_size=16",
        "--epochs=3",
        "--log_every_steps=2",
        "--lr_schedule=cosine",
        "--crop_padding=1",
    ]


def test_a_run_writes_its_files_and_repeats_bit_for_bit(images, cache, tmp_path):
    summaries = []
    for name in ("a", "b"):
        done = cifar(cache, *small(images, tmp_path / name))
        assert done.returncode == 0, done.stderr
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
    first, second = summaries
    assert first["params_sha256"] == second["params_sha256"]
    assert first["test_error"] == second["test_error"] <= 0.2
    assert first["best_test_error"] <= first["test_error"]
    assert (first["stages"], first["staleness"]) == (2, [2, 0])
    assert 0.5 <= first["balance"] <= 1
    assert first["train_seconds"] > 0
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "checkpoints",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "summary.json",
    ]
    with Image.open(tmp_path / "a" / "curves.png") as picture:
        assert picture.width > 800

    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["beta"] == 1.0
    assert config["cuts"] == [2]
    assert [row["staleness"] for row in config["stages"]] == [2, 0]
    assert {"jax", "flax", "optax", "python"} <= set(config["versions"])
    assert set(config["devices"]) == {
        device for row in config["stages"] for device in row["devices"]
    }

    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    keys = {"step", "epoch", "split", "loss", "error", "images_per_second", "seconds"}
    assert all(set(line) == keys for line in lines)
    tests = [line for line in lines if line["split"] == "test"]
    assert [line["epoch"] for line in tests] == [1, 2, 3]
    train = [line for line in lines if line["split"] == "train"]
    assert train[-1]["step"] == 15  # 80 images, batches of 16, 3 epochs; drained
    assert tests[-1]["error"] == first["test_error"]

    # On screen: the grid, the stage table, a line for every evaluation, the closing table.
    for text in ("2 | F2 B0 U   F1 B1 U", "staleness", "epoch   2.00", first["params_sha256"][:16]):
        assert text in done.stdout


@pytest.mark.slow
def test_seed_order_beta_and_method_each_change_the_result(images, cache, tmp_path):
    hashes = set()
    for i, change in enumerate(
        ["--seed=0", "--seed=1", "--order=backward_first", "--beta=0.5", "--method=backprop"]
    ):
        done = cifar(cache, *small(images, tmp_path / str(i)), "--steps=6", change)
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / str(i) / "summary.json").read_text())
        assert summary["steps"] == 6
        hashes.add(summary["params_sha256"])
    assert len(hashes) == 5


@pytest.mark.slow
def test_half_precision_own_derivatives_and_short_messages_change_no_more_than_rounding(
    images, cache, tmp_path
):
    summaries = {}
    changes = (
        "--dtype=float32",
        "--dtype=bfloat16",
        "--nofast_derivatives",
        "--message_dtype=int8",
    )
    for change in changes:
        workdir = tmp_path / change[2:]
        done = cifar(cache, *small(images, workdir), "--steps=4", change)
        assert done.returncode == 0, done.stderr
        summaries[change] = json.loads((workdir / "summary.json").read_text())
    full, half, plain, sent = summaries.values()
    assert len({s["params_sha256"] for s in summaries.values()}) == 4
    assert half["test_loss"] == pytest.approx(full["test_loss"], rel=0.1)
    assert plain["test_loss"] == pytest.approx(full["test_loss"], rel=1e-3)
    assert sent["test_loss"] == pytest.approx(full["test_loss"], rel=0.1)


@pytest.mark.slow
def test_flags_that_a_method_does_not_use_are_ignored(images, cache, tmp_path):
    hashes = set()
    for i, change in enumerate(["--beta=1", "--beta=0.5", "--order=backward_first"]):
        arguments = [*small(images, tmp_path / str(i)), "--steps=4", "--method=backprop", change]
        assert cifar(cache, *arguments).returncode == 0
        summary = json.loads((tmp_path / str(i) / "summary.json").read_text())
        hashes.add(summary["params_sha256"])
    assert len(hashes) == 1


def test_measured_cuts_and_the_validation_split_are_recorded(images, cache, tmp_path):
    done = cifar(
        cache,
        *small(images, tmp_path / "run"),
        "--partition=time",
        "--num_stages=3",
        "--validation_size=20",
        "--steps=4",
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert len(config["cuts"]) == 2
    assert config["cost_unit"] == "seconds"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "validation_error" in summary
    assert "test_error" not in summary


STALENESS = {
    **{name: [2, 0] for name in ("fdg", "dsp", "petra")},
    **{name: [1, 0] for name in ("ddg", "fr", "pipedream", "pipemare", "adl", "paci")},
    "pipedream_2bw": [1, 1],
    "data_parallel": [0],
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("adl", "fdg", "gpipe") else pytest.mark.slow)
        for name in methods.METHODS
    ],
)
def test_every_method_trains(name, images, tmp_path, monkeypatch):
    # Which devices and caches there are is settled for all tests.
    monkeypatch.setattr(setup, "prepare_jax", lambda *arguments: None)
    values = flags.FlagValues()
    settings.define_flags(values)
    values(["cifar", *small(images, tmp_path / "run"), f"--method={name}", "--steps=12"])
    summary = loop.run(settings.from_flags(values), Images)
    # Twelve steps are too few for a synthesizer.
    assert summary["test_error"] <= (0.6 if name.startswith("dni") else 0.2)
    assert summary["staleness"] == STALENESS.get(name, [0, 0])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--message_dtype=int8"],
        *(
            pytest.param(arguments, marks=pytest.mark.slow)
            for arguments in (
                ["--method=dgl"],
                ["--method=petra", "--model=small_revnet", "--partition=flops"],
                ["--method=dgl", "--message_dtype=int8"],
                ["--method=dni", "--synthesizer_width=8"],
                ["--method=dni_late", "--synthesizer_width=8", "--phases=2:1"],
                ["--gradient=reconstruct"],
            )
        ),
    ],
    ids=" ".join,
)
def test_a_run_that_was_stopped_goes_on_to_the_bit(
    arguments, images, tmp_path, monkeypatch, capsys
):
    # Which devices and caches there are is settled for all tests.
    monkeypatch.setattr(setup, "prepare_jax", lambda *arguments: None)

    def train(name: str) -> list[dict]:
        values = flags.FlagValues()
        settings.define_flags(values)
        options = [*small(images, tmp_path / name), "--steps=9", "--log_every_steps=2"]
        values(["cifar", *options, *arguments])
        loop.run(settings.from_flags(values), Images)
        return without_times(tmp_path / name)

    whole = train("whole")
    fetch = loop.fetch

    def stop(loader, step):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return fetch(loader, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "fetch", stop)
        with pytest.raises(Stopped, match="stopped after step 5; the same command goes on"):
            train("run")
    assert not (tmp_path / "run" / "summary.json").exists()
    capsys.readouterr()
    assert train("run") == whole
    assert "goes on after step 5" in capsys.readouterr().out


def without_times(workdir: pathlib.Path) -> list[dict]:
    """Summary and metrics of a run."""
    times = ("images_per_second", "seconds", "train_seconds")
    text = [(workdir / "summary.json").read_text()]
    text += (workdir / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in text]
    return [{n: v for n, v in line.items() if n not in times} for line in lines]


@pytest.mark.parametrize(
    ("arguments", "message"),
    thinned(
        [
            (["--method=gpipe", "--microbatches=3"], "--microbatches=3"),
            (["--method=one_f_one_b", "--microbatches=0"], "--microbatches=0"),
            (["--method=adl", "--accumulate=0"], "--accumulate=0"),
            (["--method=pipedream_2bw", "--accumulate=1"], "accumulate=1"),
            (["--method=adl", "--accumulate=100000", "--steps=5"], "--accumulate=100000"),
            (["--gradient=fresh"], "--gradient=fresh"),
            (["--reduction=max"], "--reduction=max"),
            (["--dtype=float16"], "--dtype=float16"),
            (["--message_dtype=int4"], "--message_dtype=int4"),
            (["--method=data_parallel", "--batch_size=15"], "--batch_size=15"),
            (["--lr_milestones=5,1e300,inf"], "--lr_milestones=inf"),
            (["--crop_padding=9"], "--crop_padding=9"),
            (["--steps=99999999999"], "--steps=99999999999"),
            (["--flagfile=/bin/ls"], "error"),
            (["--dataset=folder:~nobody-of-this-name/x"], "--dataset=folder:~nobody"),
            (["--model=resnet21"], "--model"),
            (["--dataset=imagenet"], "--dataset=imagenet"),
            (["--method=magic"], "--method=magic"),
            (["--num_stages=6", "--partition=flops"], "--num_stages=6"),
            (["--num_stages=0", "--partition=flops"], "--num_stages=0"),
            (["--partition=3,2"], "--partition=3,2"),
            (["--partition=first"], "--partition=first"),
            (["--beta=0"], "--beta=0.0"),
            (["--beta=1.5"], "--beta=1.5"),
            (["--beta=nan"], "--beta=nan"),
            (["--dropout=1"], "--dropout=1.0"),
            (["--dropout=0.1"], "dropout=0.1: small_resnet has none"),
            (["--learning_rate=inf"], "--learning_rate=inf"),
            (["--lr_milestones=10,nan"], "--lr_milestones=nan"),
            (["--lr_milestones=a"], "--lr_milestones=a"),
            (["--momentum=1"], "--momentum=1"),
            (["--batch_size=81"], "--batch_size=81"),
            (["--batch_size=many"], "--batch_size=many"),
            (["--seed=-1"], "--seed=-1"),
            (["--dataset=folder:/no/such/folder"], "/no/such/folder"),
            (["--flagfile=/no/such/file"], "/no/such/file"),
            (["--betta=1"], "betta"),
            (["something"], "something"),
        ],
        keep=5,
    ),
)
def test_bad_input_is_one_line_and_status_2_and_leaves_nothing(
    images, cache, tmp_path, arguments, message
):
    done = cifar(cache, *small(images, tmp_path / "run"), *arguments)
    refused(done, message)
    assert not (tmp_path / "run").exists()


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert all(line.startswith("decoding images") for line in before)
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("damage", ["empty class", "broken image"])
def test_a_damaged_folder_is_refused(images, cache, tmp_path, damage):
    for split in ("train", "test"):
        for label in ("dark", "light"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            if (split, label, damage) != ("train", "light", "empty class"):
                pixels = (images / split / label / "0.png").read_bytes()
                (folder / "0.png").write_bytes(pixels)
    if damage == "broken image":
        broken = tmp_path / "images" / "train" / "light" / "0.png"
        broken.write_bytes(broken.read_bytes()[:60])
    done = cifar(cache, *small(tmp_path / "images", tmp_path / "run"), "--batch_size=1")
    assert "light" in done.stderr
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written_or_is_taken_is_refused(images, cache, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(cifar(cache, *small(images, tmp_path / "file" / "run")), "--workdir=")
    refused(cifar(cache, *small(images, "/proc/run")), "--workdir=/proc/run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for flag in ("--resume", "--noresume"):
        refused(cifar(cache, *small(images, tmp_path / "run"), flag), "--overwrite")
        assert (tmp_path / "run" / "config.json").read_text() == "{}"
    (tmp_path / "run" / "config.json").rename(tmp_path / "run" / "summary.json")
    refused(cifar(cache, *small(images, tmp_path / "run")), "summary.json")
    assert (tmp_path / "run" / "summary.json").read_text() == "{}"
    assert (tmp_path / "file").read_text() == "mine"


def test_help_names_every_flag(cache):
    done = cifar(cache, "--help")
    assert done.returncode == 0
    for name in ("--beta", "--method", "--num_stages", "--[no]resume", "--[no]overwrite"):
        assert name in done.stdout
