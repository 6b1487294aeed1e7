"""python -m experiments.benchmark: what it measures, writes and refuses."""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys

import jax
import pytest
from absl import flags
from PIL import Image

from experiments import benchmark
from experiments.benchmarking import contender, tables
from experiments.benchmarking.workload import Settings
from experiments.common import machine
from experiments.common.errors import UsageError
from tests.experiments.tiny import QUIET

ROOT = pathlib.Path(__file__).parents[2]
FLAGFILES = sorted((ROOT / "experiments" / "flags").glob("benchmark_*.cfg"))


def test_bound_of_stages_that_share_devices():
    alone = [[1.0, 2.0], [2.0, 1.0], [4.0, 4.0]]
    apart = tables.bound(alone, ["a", "b", "c"], [5.0, 8.0])
    assert apart["bound"]["rounds"] == [4.0, 4.0]
    assert apart["efficiency"]["rounds"] == [0.8, 0.5]
    assert [u["rounds"] for u in apart["utilisation"]] == [[0.2, 0.25], [0.4, 0.125], [0.8, 0.5]]
    assert apart["balance"]["median"] == pytest.approx(7 / 12)
    shared = tables.bound(alone, ["a", "b", "a"], [5.0, 8.0])
    assert shared["bound"]["rounds"] == [5.0, 6.0]
    assert shared["efficiency"]["median"] == pytest.approx((1 + 0.75) / 2)


def check_numbers(results: dict, names: list[str], rounds: int) -> None:
    """What must hold between the numbers of benchmark.json."""
    rows = {row["name"]: row for row in results["contenders"]}
    assert list(rows) == names
    assert len(results["rounds"]) == rounds
    base = rows["backprop"]["seconds"]["rounds"]
    for name, row in rows.items():
        seconds = row["seconds"]
        assert len(seconds["rounds"]) == rounds
        assert min(seconds["rounds"]) > 0
        assert seconds["median"] == statistics.median(seconds["rounds"])
        assert (seconds["min"], seconds["max"]) == (min(seconds["rounds"]), max(seconds["rounds"]))
        ratios = [b / a for b, a in zip(base, seconds["rounds"], strict=True)]
        assert row["over"]["backprop"]["rounds"] == pytest.approx(ratios)
        assert row["over"]["backprop"]["median"] == pytest.approx(statistics.median(ratios))
        assert set(row["over"]) == set(names)
        assert ("bound" in row) == name.startswith("fdg")
        if "bound" not in row:
            continue
        for r in range(rounds):
            slowest = max(part["seconds"]["rounds"][r] for part in row["parts"])
            assert row["bound"]["bound"]["rounds"][r] == slowest
            efficiency = slowest / seconds["rounds"][r]
            assert row["bound"]["efficiency"]["rounds"][r] == pytest.approx(efficiency)
            together = row["bound"]["at_once"]["rounds"][r]
            assert together > 0
            share = together / seconds["rounds"][r]
            assert row["bound"]["of_at_once"]["rounds"][r] == pytest.approx(share)


def test_a_long_run_tells_its_own_drift_from_the_machines():
    """The machine slows down by a half; FDG, and what it holds, grow by a tenth besides."""
    machine_ms = [10.0] * 5 + [15.0] * 6
    fdg_ms = [0.6 * ms * (1 if r < 8 else 1.1) for r, ms in enumerate(machine_ms)]
    seconds = {
        "backprop": [ms / 1e3 for ms in machine_ms],
        "fdg": [ms / 1e3 for ms in fdg_ms],
    }
    results = {
        "base": "backprop",
        "rounds": [{"live_bytes": 2e6 if r < 8 else 2.2e6} for r in range(11)],
        "contenders": [
            {
                "name": name,
                "seconds": tables.spread(own),
                "over": tables.over(seconds, name),
            }
            for name, own in seconds.items()
        ],
    }
    _, heads, (backprop, own, live) = tables.drift(results)
    assert len(heads) == len(backprop) == len(own) == len(live)
    assert backprop[-2:] == ["1.500", "1.000"]
    assert own[-2:] == ["1.650", "0.909"]
    assert live[1:6] == ["2.000", "2.000", "2.000", "2.000", "2.200"]


def test_a_run(tiny, capsys):
    names = ["backprop", "engine_k1", "data_parallel", "gpipe", "fdg", "fdg_recompute"]
    results = benchmark.run(dataclasses.replace(tiny, contenders=(*names, "fdg"), microbatches=2))
    folder = pathlib.Path(tiny.workdir)
    assert {path.name for path in folder.iterdir()} == set(benchmark.FILES)
    assert json.loads((folder / "benchmark.json").read_text()) == json.loads(json.dumps(results))
    check_numbers(results, names, rounds=3)
    assert results["fair"] is True
    assert results["steps"] == 2
    # Every turn was first once, in this order.
    assert [entry["first"] for entry in results["rounds"]] == names[:3]
    assert not {"workdir", "torch_python"} & set(results["settings"])
    page, screen = (folder / "benchmark.md").read_text(), capsys.readouterr().out
    assert "round 3/3" in screen
    assert "load average 0.10" in screen
    for text in (page, screen):
        assert "NOT A FAIR" not in text
        assert "tiny, 2x2, batch 8" in text
        assert "fdg_recompute" in text
    median = results["contenders"][4]["seconds"]["median"]
    assert f"| fdg | 2 | 2 | {1e3 * median:.1f} |" in page
    with Image.open(folder / "benchmark.png") as image:
        assert image.width > 800
        assert image.height > 300
        assert len(image.convert("RGB").getcolors(10**6)) > 3


def test_the_order_moves_on_and_every_turn_is_as_long(tiny, monkeypatch):
    order: list[tuple[str, int]] = []

    class Fake(contender.Contender):
        devices, about, loss = 1, "fake", 1.0

        def __init__(self, name: str) -> None:
            self.name = name

        def turn(self, steps: int) -> float:
            order.append((self.name, steps))
            return {"backprop": 0.25, "ddg": 0.5}[self.name] * steps

    monkeypatch.setattr(contender, "make", lambda name, work: Fake(name))
    chosen = dataclasses.replace(
        tiny, contenders=("backprop", "ddg"), rounds=2, steps=0, turn_seconds=1.1
    )
    results = benchmark.run(chosen)
    assert results["steps"] == 5  # 1.1 s of 0.25 s a step, rounded up
    warm = [("backprop", 3), ("ddg", 3), ("backprop", 2), ("ddg", 2)]
    assert order == [*warm, ("backprop", 5), ("ddg", 5), ("ddg", 5), ("backprop", 5)]
    assert results["contenders"][1]["over"]["backprop"]["rounds"] == [0.5, 0.5]


def test_a_busy_machine_is_not_fair(tiny, monkeypatch, capsys):
    reason = "other programs used 1.50 cores before it began"
    monkeypatch.setattr(machine, "at_rest", lambda max_load: (dict(QUIET), reason))
    chosen = dataclasses.replace(tiny, contenders=("backprop",), rounds=1)
    results = benchmark.run(chosen)
    assert (results["fair"], results["unfair"]) == (False, [reason])
    assert "NOT A FAIR COMPARISON: other programs used 1.50 cores" in capsys.readouterr().out
    page = pathlib.Path(tiny.workdir, "benchmark.md").read_text()
    assert f"NOT A FAIR COMPARISON ({reason})" in page


def test_a_round_that_was_disturbed_is_not_fair(tiny, monkeypatch):
    used = iter([0.1, 0.9, None])
    monkeypatch.setattr(machine, "cores_of_others", lambda before, after: next(used))
    results = benchmark.run(dataclasses.replace(tiny, contenders=("backprop",)))
    assert results["unfair"] == ["other programs used up to 0.90 cores in 1 of 3 rounds"]
    assert [entry["cores_of_others"] for entry in results["rounds"]] == [0.1, 0.9, None]


def test_torch_is_left_out_of_other_networks(tiny, capsys):
    chosen = dataclasses.replace(tiny, contenders=("backprop", "backprop_torch"), rounds=1)
    results = benchmark.run(chosen)
    assert [row["name"] for row in results["contenders"]] == ["backprop"]
    note = "backprop_torch is skipped: tiny is not written in PyTorch here; "
    note += "plain16 and transformer are"
    assert results["notes"] == [note]
    assert note in capsys.readouterr().out


def parse(*arguments: str) -> Settings:
    values = flags.FlagValues()
    benchmark.define_flags(values)
    assert values(["benchmark", *arguments]) == ["benchmark"]
    return benchmark.from_flags(values)


REFUSED = {
    "--workdir=": "--workdir: is missing; name the folder",
    "--model=alexnet": "--model: model='alexnet': allowed are",
    "--contenders=": "--contenders=: give at least one of backprop, backprop_xla, engine_k1",
    "--contenders=fgd": "--contenders=fgd: no such contender; allowed are backprop",
    "--contenders=one_device_k0": "--contenders=one_device_k0: no such contender",
    "--contenders=one_device_k6": "has 5 layers that can be split, so choose one_device_k1 to",
    "--num_stages=6": "--num_stages=6: small_resnet has 5 layers that can be split, so choose 1 to",
    "--num_stages=0": "--num_stages=0: must be 1 or more",
    "--image_size=0": "--image_size=0: must be 1 or more",
    "--batch_size=6": "--microbatches=4: does not divide --batch_size=6, as gpipe asks",
    "--batch_size=5 --microbatches=1": "--batch_size=5: does not divide over the 2 devices of data",
    "--model=transformer --heads=3": "--heads=3: does not divide --width=64",
    "--rounds=0": "--rounds=0: must be 1 or more",
    "--steps=-1": "--steps=-1: must be 0 or more",
    "--turn_seconds=0": "--turn_seconds=0.0: must be above 0; 3 is usual",
    "--max_load=nan": "--max_load=nan: must be 0 or more cores; 0.5 is usual",
    "--partition=2,3": "--partition=2,3: not understood; give time, flops, or 1 layer numbers",
    "--partition=5": "--partition=5: not understood",
    "--partition=even": "--partition=even: not understood",
    "--torch_python=no/python": "--torch_python=no/python: is no program; name the Python that",
}


def test_refusals(monkeypatch):
    monkeypatch.setattr("experiments.benchmarking.workload.cores", lambda: 2)
    all_of_them = "--contenders=data_parallel,gpipe,backprop_torch"
    usual = ["--workdir=somewhere", "--model=small_resnet", all_of_them]
    parse(*usual).check()
    for given, message in REFUSED.items():
        with pytest.raises(UsageError) as refused:
            parse(*usual, *given.split()).check()
        assert message in str(refused.value), given


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", "--model=small_resnet", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_exit_status(tmp_path):
    for flag, message in {"--rounds=0": "--rounds=0: must be 1", "--rounds=few": "few"}.items():
        done = command(f"--workdir={tmp_path}/new", flag)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_command(tmp_path):
    sizes = ("--image_size=8", "--batch_size=4", "--rounds=2", "--steps=2", "--partition=2")
    done = command(*sizes, "--contenders=backprop,fdg", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "benchmark.json").read_text())
    check_numbers(results, ["backprop", "fdg"], rounds=2)
    assert results["contenders"][1]["cuts"] == [2]
    assert ("NOT A FAIR COMPARISON" in done.stdout) == (not results["fair"])
    assert results["fair"] == (not results["unfair"])
    assert f"{results['machine']['cores']} cores" in done.stdout
    assert results["machine"]["versions"]["jax"] == jax.__version__


def test_results_are_replaced_when_asked(tiny):
    folder = pathlib.Path(tiny.workdir)
    folder.mkdir()
    (folder / "benchmark.md").write_text("old")
    chosen = dataclasses.replace(tiny, contenders=("backprop",), rounds=1)
    with pytest.raises(UsageError, match="or add --overwrite"):
        benchmark.run(chosen)
    benchmark.run(dataclasses.replace(chosen, overwrite=True))
    assert (folder / "benchmark.md").read_text() != "old"


def test_a_training_run_is_left_alone(tiny):
    folder = pathlib.Path(tiny.workdir)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="holds a training run; name another folder"):
        benchmark.run(dataclasses.replace(tiny, overwrite=True))
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("path", FLAGFILES, ids=lambda path: path.stem)
def test_flagfile(path):
    settings = parse(
        f"--flagfile={path}", "--workdir=somewhere", f"--torch_python={sys.executable}"
    )
    settings.check()
    assert settings.rounds >= 5
    # Layers of a few microseconds are not worth measuring; bytes ask for a certain cut.
    told = {"dispatch": "flops", "family": "flops", "petra": "1,3,5"}
    assert settings.partition == told.get(path.stem.removeprefix("benchmark_"), "time")
    text = path.read_text()
    assert text.startswith("# ")
    assert f"--flagfile=experiments/flags/{path.name}" in text
    assert "minutes" in text


def test_flagfiles_are_there():
    names = {"benchmark_cpu", "benchmark_one_device", "benchmark_memory", "benchmark_petra"}
    assert {path.stem for path in FLAGFILES} >= names
    assert set(benchmark.HELP) == {field.name for field in dataclasses.fields(Settings)}
