"""python -m experiments.simulate: what it prints and writes, and how it refuses."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.simulate", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_files(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "timeline.png").write_bytes(b"of an earlier simulation")
    done = simulate(
        "--stages=2,4",
        "--methods=backprop,fdg,ddg,gpipe,fr",
        "--parameter_bytes=100",
        "--draw_batches=6",
        f"--workdir={folder}",
    )
    assert done.returncode == 0, done.stderr
    names = {"simulate.json", "timeline.png", "timeline.trace.json"}
    assert {path.name for path in folder.iterdir()} == names
    for title in (
        "ideal: no transfers",
        "transfer: 0 s a mini-batch + 0.25 s a message",
        "slow: the last stage takes 2 times as long",
    ):
        assert title in done.stdout
    written = json.loads((folder / "simulate.json").read_text())
    assert written["flags"]["stages"] == ["2", "4"]
    ideal, transfer, slow = written["blocks"]
    assert [b["block"] for b in written["blocks"]] == ["ideal", "transfer", "slow"]
    found = {(r["method"], r["stages"]): r for r in ideal["rows"]}
    assert len(found) == 10
    for k in (2, 4):
        assert found["backprop", k]["over_backprop"] == 1
        assert found["fdg", k]["over_backprop"] == pytest.approx(k, rel=1e-12)
        assert found["ddg", k]["over_backprop"] == pytest.approx(k, rel=1e-12)
        assert found["fr", k]["over_backprop"] == pytest.approx(k * 3 / 4, rel=1e-12)
        assert found["gpipe", k]["over_backprop"] == pytest.approx(4 * k / (4 + k - 1), rel=1e-12)
        assert found["fdg", k]["in_flight"] == [2 * hops + 1 for hops in reversed(range(k))]
        assert found["fr", k]["gradient"] == "recompute"
    assert found["fdg", 2]["peak_bytes"] == [400, 200]
    hidden = {(r["method"], r["stages"]): r for r in transfer["rows"]}
    assert hidden["fdg", 4]["over_one_device"] == pytest.approx(4)
    assert hidden["ddg", 4]["over_one_device"] < 4
    assert max(r["batches_per_second"] for r in slow["rows"]) == pytest.approx(1 / 6)

    trace = json.loads((folder / "timeline.trace.json").read_text())
    assert sum(row["ph"] == "X" for row in trace["traceEvents"]) == 6 * 4 * 3
    with Image.open(folder / "timeline.png") as image:
        assert image.width > 800
        assert image.height > 200


def test_costs_of_each_stage_and_no_files():
    done = simulate(
        *("--stages=3", "--forward=1,2,1", "--backward=2,4,2", "--latency=0", "--slow_factor=1"),
        *("--methods=fdg,one_f_one_b", "--update=0.5"),
    )
    assert done.returncode == 0, done.stderr
    assert "ideal" in done.stdout
    assert "slow:" not in done.stdout
    assert "transfer:" not in done.stdout
    assert "wrote" not in done.stdout


REFUSED = {
    "--stages=two": "--stages=two: give whole numbers",
    "--stages=0": "--stages=0: give whole numbers",
    "--methods=adam": "--methods=adam: no such method; allowed are backprop",
    "--methods=": "--methods=: give at least one of backprop",
    "--methods=data_parallel": "--methods=data_parallel: no such method",
    "--forward=1,2": "--forward=1,2: give one number, or 3 with commas for 3 stages",
    "--backward=-1": "--backward[0]=-1.0: must be finite",
    "--transfer=nan": "--transfer[0]=nan",
    "--transfer=1,2,3": "or 2 with commas for 2 hops",
    "--latency=x": "latency",
    "--slow_stage=3": "--slow_stage=3: allowed are -3 to 2",
    "--slow_factor=0": "--slow_factor=0.0: must be above 0",
    "--microbatches=0": "--microbatches=0: a mini-batch has at least one part",
    "--accumulate=0": "--accumulate=0: must be 1 or more",
    "--gradient=fresh": "gradient",
    "--draw_batches=0": "--draw_batches=0: must be 1 or more",
    "--draw=nothing": "draw",
    "--workdir=README.md": "--workdir=README.md: cannot be written",
}
ONE_BY_ONE = """
import json, sys
from absl import flags
from experiments import simulate

simulate.define_flags()
messages = {}
for flag in json.loads(sys.argv[2]):
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    try:
        flags.FLAGS(["simulate", "--stages=3", sys.argv[1], flag])
        simulate.main()
    except (ValueError, flags.Error) as error:
        messages[flag] = str(error)
print(json.dumps(messages))
"""


def test_refusals(tmp_path):
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, f"--workdir={folder}", json.dumps(list(REFUSED))],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)  # nothing else has been printed
    for flag, message in REFUSED.items():
        assert message in messages[flag]
    assert not folder.exists()


@pytest.mark.parametrize("flag", ["--methods=adam", "--latency=x", "--workdir=README.md"])
def test_exit_status(flag, tmp_path):
    folder = tmp_path / "run"
    done = simulate("--stages=3", f"--workdir={folder}", flag)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not folder.exists()


def test_a_training_run_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = simulate("--stages=2", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "holds a training run; name another folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
