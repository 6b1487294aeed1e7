"""Metrics beside metrics.jsonl: every line once, whenever a run was stopped."""

import contextlib
import importlib.util
import json
import pathlib
import struct
import subprocess
import sys

import pytest

from experiments.common.errors import UsageError
from experiments.common.workdir import Workdir
from experiments.images.settings import Settings
from experiments.training import resume, writers

ROOT = pathlib.Path(__file__).parents[3]
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboardX") is None, reason="needs the extra tensorboard"
)
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="needs the extra wandb"
)


def line(step: int, split: str = "train", loss: float | None = 0.5) -> dict:
    return {"step": step, "epoch": step / 10, "split": split, "loss": loss, "error": 0.25}


def scalars(folder: pathlib.Path) -> list[tuple[str, int, float]]:
    """What stands in the event files: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            content = content[16 + length :]
    return sorted(found)


def stopped_and_resumed(folder: pathlib.Path, name: str) -> list[dict]:
    """A run that is killed after four lines and goes on from a checkpoint after two of them."""
    out = Workdir(str(folder), overwrite=False)
    out.write_json("config.json", {"method": "fdg"})
    with (
        contextlib.suppress(KeyboardInterrupt),
        writers.attached(name, out, {"method": "fdg"}),
    ):
        for step in (2, 4, 6, 8):
            out.append_metrics(line(step, loss=float("nan") if step == 4 else 0.5))
        raise KeyboardInterrupt
    out = Workdir(str(folder), overwrite=False, resume=True)
    out.cut_metrics(2)
    with writers.attached(name, out, {"method": "fdg"}):
        for step in (6, 8, 10):
            out.append_metrics(line(step))
        out.append_metrics(line(10, "test"))
    return out.metrics()


def straight(folder: pathlib.Path, name: str, lines: list[dict]) -> None:
    """The same lines without a stop."""
    out = Workdir(str(folder), overwrite=False)
    out.write_json("config.json", {"method": "fdg"})
    with writers.attached(name, out, {"method": "fdg"}):
        for one in lines:
            out.append_metrics(one)


@needs_tensorboard
def test_tensorboard_has_what_metrics_has(tmp_path):
    lines = stopped_and_resumed(tmp_path / "run", "tensorboard")
    expected = [
        (f"{m['split']}/{name}", m["step"], pytest.approx(m[name]))
        for m in lines
        for name in ("epoch", "loss", "error")
        if m[name] is not None
    ]
    assert len(lines) == 6
    assert scalars(tmp_path / "run" / "tensorboard") == sorted(expected, key=lambda e: e[:2])


@needs_tensorboard
def test_what_others_wrote_stays(tmp_path):
    other = tmp_path / "run" / "tensorboard" / "events.out.tfevents.1"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"of somebody else")
    stopped_and_resumed(tmp_path / "run", "tensorboard")
    assert other.read_bytes() == b"of somebody else"
    assert len(list(other.parent.iterdir())) == 2


def test_folders_go_with_a_run_that_is_replaced_only(tmp_path):
    workdir, every = str(tmp_path), ("checkpoints", "profile", "tensorboard", "wandb")
    for begun, overwrite in ((False, False), (False, True), (True, False), (True, True)):
        if begun:
            (tmp_path / "config.json").touch()
        folders = resume.folders(Settings(workdir, overwrite=overwrite))
        assert folders == (every if begun and overwrite else every[:1])


@needs_wandb
def test_wandb_offline_keeps_one_run(tmp_path, monkeypatch):
    """In a process of its own: wandb starts threads and a service."""
    code = (
        "import pathlib\n"
        "from tests.experiments.training.test_writers import stopped_and_resumed, straight\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "straight(folder / 'straight', 'wandb', stopped_and_resumed(folder / 'run', 'wandb'))\n"
    )
    monkeypatch.delenv("WANDB_MODE", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    counts = []
    for name in ("run", "straight"):
        (run,) = (tmp_path / name / "wandb").glob("offline-run-*/*.wandb")
        content = run.read_bytes()
        counts.append([content.count(tag) for tag in (b"train/loss", b"train/error", b"test/loss")])
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_what_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="no writer 'mlflow'; allowed are tensorboard, wandb"):
        writers.check("tensorboard,mlflow")
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"tensorboardX is not installed; pip install .*tensorb"):
        Settings("runs/a", writers="tensorboard").check()
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UsageError, match="WANDB_MODE=sometimes is not known; allowed are offline"):
        writers.check("wandb")
    writers.check("")


def test_a_writer_that_is_missing_leaves_nothing_behind(tmp_path):
    """The program without the package: status 2, one line, no folder."""
    code = (
        "import importlib.util, sys\n"
        "importlib.util.find_spec = lambda name: None\n"
        "from absl import flags\n"
        "from experiments import cifar\n"
        "from experiments.common import command\n"
        "cifar.define_flags()\n"
        "command.run(cifar.main)\n"
    )
    arguments = [f"--workdir={tmp_path / 'run'}", "--writers=wandb"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --writers=wandb: wandb is not installed")
    assert "pip install -e .[wandb]" in done.stderr
    assert not (tmp_path / "run").exists()


def test_metrics_are_lines_of_json_without_any_writer(tmp_path):
    out = Workdir(str(tmp_path / "run"), overwrite=False)
    with writers.attached("", out, {}):
        out.append_metrics(line(2, loss=float("inf")))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(text) == line(2, loss=None)
