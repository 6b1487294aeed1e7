"""--timeline, --profile and --writers of experiments.cifar: they add, and change nothing."""

import gzip
import json
import types

import jax
import pytest
from PIL import Image

import fdg_jax as fdg
from experiments.common.errors import UsageError
from experiments.training import timeline
from fdg_jax.analysis.recorder import Recorder, expected
from tests import networks
from tests.experiments.test_cifar import cache, cifar, images, small  # noqa: F401


@pytest.mark.slow
def test_a_watched_run_ends_as_one_that_is_not(images, cache, tmp_path):  # noqa: F811
    base = [*small(images, tmp_path), "--epochs=10", "--eval_every_epochs=10"]
    added = ("--timeline=20", "--profile=2", "--writers=tensorboard")
    pytest.importorskip("tensorboardX")
    hashes = []
    for name, flags in (("plain", ()), ("watched", added)):
        done = cifar(cache, *base, f"--workdir={tmp_path / name}", *flags)
        assert done.returncode == 0, done.stderr
        hashes.append(json.loads((tmp_path / name / "summary.json").read_text())["params_sha256"])
    assert hashes[0] == hashes[1]
    assert "timeline: stages busy" in done.stdout

    folder = tmp_path / "watched"
    assert {path.name for path in folder.iterdir()} - {
        path.name for path in (tmp_path / "plain").iterdir()
    } == {"timeline.json", "timeline.png", "profile", "tensorboard"}
    written = json.loads((folder / "timeline.json").read_text())
    events = [row for row in written["traceEvents"] if row["ph"] == "X"]
    assert all({"name", "ts", "dur", "pid", "tid"} <= set(row) for row in events)
    for pid in (0, 1):  # measured, simulated: the same programs
        names = [row["name"] for row in events if row["pid"] == pid and row["tid"] == 1]
        assert names[3:6] == ["F23 B23 U", "F24 B24 U", "F25 B25 U"]
    numbers = timeline.read((folder / "timeline.json").read_text())
    for name in ("measured", "simulated"):
        assert len(numbers[name]["utilisation"]) == 2
        assert sum(numbers[name]["at_once"]) == pytest.approx(1)
        assert numbers[name]["batches_per_second"] > 0
    with Image.open(folder / "timeline.png") as picture:
        assert picture.width > 800

    # The profiler's trace names the actions.
    (trace,) = (folder / "profile").rglob("*.trace.json.gz")
    with gzip.open(trace) as file:
        named = {row.get("name") for row in json.load(file)["traceEvents"]}
    assert {"F42@0", "F41 B41 U@1", "B40 U@0"} <= named


@pytest.mark.parametrize("name", ["fdg", "backprop"])
def test_who_works_at_once(name):
    """The order of programs decides it, not how fast the machine is."""
    layers = [networks.dense(200) for _ in range(4)]
    data = [(x.repeat(64, 0).repeat(50, 1), y.repeat(64)) for x, y in networks.batches(1)] * 40
    stages = fdg.partition(layers, 2, data[0][0], cost=[2])
    schedule = fdg.schedule.create(name, 2)
    pipe = fdg.Pipeline(stages, networks.loss_fn, networks.sgd(1, 2), schedule)
    state = pipe.init(jax.random.key(0), data[0][0])
    for batch in data[:4]:
        state, _ = pipe.step(state, batch)
    recorder = Recorder(pipe, 30)
    for batch in data[4:]:
        state, _ = pipe.step(state, batch)
    run = recorder.timeline()
    numbers = timeline.figures(run, expected(run))
    if name == "backprop":
        assert numbers["measured"]["at_once"][2] == pytest.approx(0, abs=1e-9)
    else:
        assert numbers["measured"]["at_once"][2] > 0.1
        assert numbers["simulated"]["at_once"][2] > 0.3


def run_of(steps: int, **flags: int) -> types.SimpleNamespace:
    settings = types.SimpleNamespace(**{"timeline": 0, "profile": 0, "method": "fdg", **flags})
    return types.SimpleNamespace(config=settings, total_steps=steps, schedule=fdg.schedule.fdg(2))


def test_a_run_that_is_too_short_is_refused():
    timeline.Watch(run_of(41, timeline=20), 0)
    timeline.Watch(run_of(3), 0)
    with pytest.raises(UsageError, match="--timeline=20 and --profile=0: need 41 steps, the first"):
        timeline.Watch(run_of(40, timeline=20), 0)
    with pytest.raises(UsageError, match="need 44 steps"):
        timeline.Watch(run_of(43, timeline=20, profile=3), 0)
    with pytest.raises(UsageError, match="--timeline=19: too short for a steady state of fdg"):
        timeline.Watch(run_of(400, timeline=19), 0)
    timeline.Watch(run_of(40, timeline=20), 30)  # a run that goes on is not refused for it


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match=r"--timeline=20 .* clocks of 2 processes"):
        timeline.Watch(run_of(100, timeline=20), 0)
    timeline.Watch(run_of(100), 0)


def test_a_run_that_goes_on_too_late_says_that_there_is_no_timeline(capsys):
    lines = []
    watch = timeline.Watch(run_of(40, timeline=20), 30)
    for step in range(30, 40):
        watch.before(step)
    watch.write(None, types.SimpleNamespace(line=lines.append))
    assert lines == ["no timeline: too few steps were left when the run went on"]
