"""python -m experiments.accelerator: what it plans and refuses, and a rehearsal."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
from absl import flags

from experiments import accelerator
from experiments.accelerating import checks, host, network, piece, training
from experiments.accelerating.piece import Piece
from experiments.accelerating.record import Record, found_in
from experiments.common.errors import UsageError
from experiments.images import settings as cifar
from tests.experiments.accelerating.fake import chosen

ROOT = pathlib.Path(__file__).parents[2]


def test_everything_is_planned_once():
    pieces = accelerator.plan(chosen("--workdir=out"), "gpu")
    names = [one.name for one in pieces]
    assert len(set(names)) == len(names)
    assert names[:3] == ["tests/oracle", "tests/engine", "tests/oracle_gpu"]
    own = [one for one in pieces if one.part == "times"]
    assert len(own) == 6 * 2 * 8
    assert own[0].name == "times/resnet20/float32/backprop"
    assert own[-1].name == "times/resnet1202/bfloat16/one_device_k8_dispatched"
    # float32 of all networks before bfloat16 of any.
    assert ["bfloat16" in one.name for one in own] == [False] * 48 + [True] * 48
    assert len([one for one in pieces if one.part == "training"]) == 8
    assert "tests/oracle_cpu" not in [
        one.name for one in accelerator.plan(chosen("--workdir=out"), "cpu")
    ]


def test_parts_and_networks_are_chosen():
    found = chosen("--workdir=out", "--parts=times", "--networks=resnet56")
    assert {one.name.split("/")[1] for one in accelerator.plan(found, "gpu")} == {"resnet56"}
    rehearsed = accelerator.plan(chosen("--workdir=out", "--rehearse"), "cpu")
    assert len(rehearsed) < 40
    assert all(one.environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" for one in rehearsed)


def test_every_program_has_a_short_run():
    programs = {p.stem for p in (ROOT / "experiments").glob("*.py") if "__main__" in p.read_text()}
    assert set(checks.PROGRAMS) == programs - {"accelerator"}
    assert set(checks.commands(pathlib.Path("out"))) == set(checks.PROGRAMS)


def test_trainings_are_the_papers():
    for rehearse in (False, True):
        for one in training.pieces(pathlib.Path("out"), "cifar10", "data", 100, rehearse):
            values = flags.FlagValues()
            cifar.define_flags(values)
            assert values(["cifar", *one.command[3:]]) == ["cifar"]
            config = cifar.from_flags(values)
            config.check()
            assert config.workdir == f"out/{one.name.removeprefix('training/').replace('/', '_')}"
            assert (config.dataset, config.data_dir, config.epochs) == ("cifar10", "data", 100)
            assert tuple(map(float, config.lr_milestones)) == (50.0, 75.0, pytest.approx(91.6667))
            if config.method == "fdg":
                assert config.order == "backward_first"
                assert rehearse or config.beta == {"resnet20": 0.2, "resnet56": 0.5}[config.model]
            else:
                assert config.beta == 1


def test_data_that_are_there_are_taken(tmp_path):
    assert training.dataset(None, str(tmp_path)) == "fashion_mnist_small"
    assert training.dataset("tfds:x", str(tmp_path)) == "tfds:x"
    (tmp_path / "cifar-10-binary.tar.gz").touch()
    assert training.dataset(None, str(tmp_path)) == "cifar10"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir: is missing"),
        (["--workdir=x", "--minutes=0"], "--minutes=0.0: must be above 0"),
        (["--workdir=x", "--minutes=nan"], "--minutes=nan: must be above 0"),
        (["--workdir=x", "--parts=speed"], "--parts=speed: no such choice; .* tests, times"),
        (["--workdir=x", "--parts="], "--parts=: no such choice"),
        (["--workdir=x", "--networks=vgg"], "--networks=vgg: no such choice; .* resnet20, trans"),
        (["--workdir=x", "--rehearse", "--networks=resnet20"], "--networks=resnet20: .* small_res"),
        (["--workdir=x", "--epochs=0"], "--epochs=0: must be 1 or more"),
    ],
)
def test_bad_flags_are_named(arguments, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        chosen(*arguments)


def test_a_piece_ends_at_its_limit_with_all_it_has_started(tmp_path):
    inner = "import time, pathlib; time.sleep(4); pathlib.Path(r'{}').touch()"
    left = tmp_path / "left"
    text = "import subprocess, sys; print('on', flush=True); subprocess.run([sys.executable, '-c', "
    text += f"{inner.format(left)!r}])"
    outcome = piece.run(Piece("tests", "x", (sys.executable, "-c", text), 1.0), 1.5)
    assert outcome.cut
    assert outcome.status < 0
    assert outcome.seconds < 4
    assert outcome.out == "on\n"
    done = piece.run(Piece("tests", "x", ("sleep", "4"), 1.0), 10)
    assert (done.status, done.cut) == (0, False)
    assert not left.exists()


def test_this_process_leaves_the_device_to_the_pieces(tmp_path):
    """A device that JAX does not find is missed by a piece, in one line, and by nobody before."""
    command = [sys.executable, "-m", "experiments.accelerator", f"--workdir={tmp_path / 'out'}"]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: JAX finds no device: ")
    assert "nowhere" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_bfloat16_of_the_transformer_keeps_its_parameters():
    tiny = network.TINY["transformer"]
    work = network.workload(tiny, "bfloat16")
    tokens = work.inputs
    x = tokens
    for i, layer in enumerate(work.layers):
        params, state = layer.init(work.key, x)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} <= {"float32", "float64"}
        x, _ = layer.apply(params, state, x, train=True, key=None)
        assert x.dtype.name == ("float32" if i == len(work.layers) - 1 else "bfloat16")
    assert x.shape == (*tokens.shape, 256)
    full = network.NETWORKS["transformer"]
    assert round(network.parameters(network.workload(full, "float32")) / 1e6) == 86


def test_a_small_rehearsal(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    settings = chosen("--rehearse", "--parts=tests,times", f"--workdir={out}")
    record = Record(str(out), settings.shared)
    record.of_machine(found_in(piece.run(host.piece(), 60)))
    assert record.machine["platform"] == "cpu"
    names = ("tests/scaling", "times/transformer/float32/backprop")
    pieces = [one for one in accelerator.plan(settings, "cpu") if one.name in names]
    assert accelerator.work(pieces, record, 5) == 0
    assert {row["state"] for row in record.rows.values()} == {"done"}, record.rows
    found = record.rows[names[1]]["found"]
    assert found["seconds"]["median"] > 0
    assert len(found["seconds"]["rounds"]) == 3
    assert (found["peak_bytes"], found["compiled"], found["stages"]) == (None, False, 1)
    assert "**A rehearsal with tiny networks" in (out / "accelerator.md").read_text()
    assert {p.name for p in out.iterdir()} == {
        *("accelerator.json", "accelerator.md", "accelerator.png"),
    }


def test_sigterm_stops_the_piece_and_the_program(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "experiments.accelerator", "--rehearse", "--parts=times"]
    process = subprocess.Popen(
        [*command, f"--workdir={out}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (out / "accelerator.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert text.endswith("stopped; the same command goes on\n")
    assert json.loads((out / "accelerator.json").read_text())["rows"] == {}


@pytest.mark.slow
def test_a_rehearsal_of_everything(tmp_path):
    command = [sys.executable, "-m", "experiments.accelerator", "--rehearse", "--minutes=30"]
    command.append(f"--workdir={tmp_path / 'out'}")
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "FAILED" not in first.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert re.search(r"^(\d+) pieces finished, 0 remaining$", again.stdout, re.MULTILINE)
