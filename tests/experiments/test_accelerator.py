"""python -m experiments.accelerator: what it plans, how it goes on, what it writes and refuses."""

import io
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
from PIL import Image

from experiments import accelerator
from experiments.accelerating import chart, checks, host, network, piece, tables, training
from experiments.accelerating.piece import MARK, Outcome, Piece
from experiments.accelerating.record import Record, found_in
from experiments.common.errors import UsageError
from experiments.images import settings as cifar

ROOT = pathlib.Path(__file__).parents[2]
MACHINE = {
    "versions": {"python": "3.11", "jax": "1", "jaxlib": "2", "fdg_jax": "3"},
    "devices": ["gpu:0"],
    "device_kind": "Test GPU",
    "cores": 16,
    "platform": "gpu",
    "memory_bytes": 80_000_000_000,
}


def chosen(*arguments: str) -> accelerator.Settings:
    values = flags.FlagValues()
    accelerator.define_flags(values)
    values(["accelerator", *arguments])
    return accelerator.from_flags(values)


def timed(ms: float, network: str, dtype: str, loop: str, peak: int | None = 2_500_000_000) -> str:
    """What the process of a case prints."""
    found = {
        "network": network,
        "about": "32x32, batch 128, SGD",
        "parameters": 270_000,
        "dtype": dtype,
        "contender": loop,
        "seconds": {"median": ms / 1e3, "min": 0.9 * ms / 1e3, "max": 1.1 * ms / 1e3},
        "peak_bytes": peak,
        "loss": 2.3,
    }
    return MARK + json.dumps(found)


class Fake:
    """Runs nothing: every piece takes a while and ends as it is told.

    Args:
      seconds: of every piece.
      ends: exit status and standard error by the piece's name.
    """

    def __init__(self, seconds: float, ends: dict[str, tuple[int, str]] | None = None) -> None:
        self.seconds, self.ends = seconds, ends or {}
        self.now = 0.0
        self.ran: list[str] = []

    def clock(self) -> float:
        return self.now

    def __call__(self, one: Piece, limit: float) -> Outcome:
        self.ran.append(one.name)
        took = min(self.seconds, limit)
        self.now += took
        status, err = self.ends.get(one.name, (0, ""))
        _, label, dtype, loop = (one.name + "///").split("/")[:4]
        out = timed(4.0, label, dtype, loop)
        return Outcome(status, took, self.seconds > limit, out, err)


@pytest.fixture
def record(tmp_path) -> Record:
    made = Record(str(tmp_path / "out"), chosen("--workdir=x").shared)
    made.of_machine(dict(MACHINE))
    return made


def again(record: Record) -> Record:
    """What the next command reads."""
    found = Record(str(record.path), record.settings)
    found.of_machine(dict(MACHINE))
    return found


def times(*names: str) -> list[Piece]:
    return [Piece("times", f"times/{name}", ("true",), 30.0, "times") for name in names]


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


def test_what_does_not_fit_is_not_begun_and_the_next_command_goes_on(record, capsys):
    pieces = times("a/float32/backprop", "a/float32/engine_k1", "b/float32/backprop")
    fake = Fake(40.0)
    # 100 s hold two of 40 s; the third is expected to take as long as the others.
    assert accelerator.work(pieces, record, 100 / 60, fake, fake.clock) == 1
    assert fake.ran == [one.name for one in pieces[:2]]
    assert json.loads((record.path / "accelerator.json").read_text())["remaining"] == 1
    other = Fake(40.0)
    assert accelerator.work(pieces, again(record), 100 / 60, other, other.clock) == 0
    assert other.ran == [pieces[2].name]
    out = capsys.readouterr().out
    assert "2 pieces finished, 1 remaining" in out
    assert "3/3  times/b/float32/backprop  4 ms a step  40 s" in out
    last = Fake(40.0)
    assert accelerator.work(pieces, again(record), 1, last, last.clock) == 0
    assert last.ran == []


def test_a_piece_that_is_cut_has_the_next_command_for_itself(record):
    pieces = times("a/float32/backprop", "a/float32/engine_k1")
    fake = Fake(10.0)

    def runner(one: Piece, limit: float) -> Outcome:
        fake.seconds = 10.0 if one is pieces[0] else 1000.0
        return fake(one, limit)

    # By what is known the second fits, but it takes longer.
    assert accelerator.work(pieces, record, 1, runner, fake.clock) == 1
    row = record.rows[pieces[1].name]
    assert (row["state"], row["error"], row["seconds"]) == ("stopped", None, 50.0)
    assert record.expected(pieces[1]) == 100.0
    # It is the first of the next command, and begun although it is expected not to fit. With all
    # the time for itself it has failed.
    assert accelerator.work(pieces, again(record), 1, runner, fake.clock) == 0
    row = again(record).rows[pieces[1].name]
    assert (row["state"], row["error"]) == ("failed", "not finished in 60 s")


def test_failures_become_rows_and_end_nothing(record, capsys):
    pieces = times("a/float32/backprop", "a/float32/engine_k1", "a/float32/one_device_k2")
    ends = {
        pieces[0].name: (1, "Traceback\njax: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
        pieces[1].name: (1, "Traceback\nValueError: a | b"),
    }
    fake = Fake(1.0, ends)
    assert accelerator.work(pieces, record, 5, fake, fake.clock) == 0
    assert [record.rows[one.name]["error"] for one in pieces] == [
        "out of memory",
        "status 1: ValueError: a | b",
        None,
    ]
    text = (record.path / "accelerator.md").read_text()
    assert "| backprop | failed: out of memory |  |  |" in text
    assert "| engine, K = 1 | failed: status 1: ValueError: a / b |" in text
    assert "FAILED  out of memory" in capsys.readouterr().out
    assert Outcome(-9, 1.0).error == "out of memory"
    # They are final, unless they are asked for.
    assert again(record).pending(pieces) == []
    record.forget_failed()
    assert record.pending(pieces) == pieces[:2]


def test_a_training_is_stopped_and_goes_on(record, tmp_path):
    folder = tmp_path / "run"
    one = Piece(
        "training", "training/resnet20/fdg_k2", ("x", f"--workdir={folder}"), 60.0, resumes=True
    )
    fake = Fake(100.0, {one.name: (75, "")})
    assert accelerator.work([one], record, 1, fake, fake.clock) == 1
    assert record.rows[one.name]["found"] == {}
    folder.mkdir()
    config = {"model": "resnet20", "method": "fdg", "num_stages": 2, "order": "backward_first"}
    config |= {"beta": 0.2, "dataset": "cifar10", "epochs": 300, "cuts": [5]}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"split": "train", "error": 0.5, "images_per_second": 900.0},
        {"split": "test", "error": 0.3, "epoch": 1.0, "seconds": 9.0, "images_per_second": 1.0},
        {"split": "test", "error": 0.4, "epoch": 2.0, "seconds": 18.0, "images_per_second": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert accelerator.work([one], record, 1, fake, fake.clock) == 1
    row = "| resnet20 | fdg | 2 | 0.2 | 2 of 300 | 40.00 | 30.00 | 18 | 900 | not finished |"
    assert row in (record.path / "accelerator.md").read_text()
    (folder / "summary.json").write_text('{"params_sha256": "7"}')
    done = Fake(5.0)
    assert accelerator.work([one], record, 1, done, done.clock) == 0
    assert record.rows[one.name]["seconds"] == 125.0
    assert record.rows[one.name]["found"]["params_sha256"] == "7"
    assert "| 18 | 900 | finished |" in (record.path / "accelerator.md").read_text()


def test_tables_and_picture(record):
    for loop, ms in (
        ("backprop", 10.0),
        ("engine_k1", 11.0),
        ("one_device_k4", 12.0),
        ("one_device_k4_dispatched", 20.0),
    ):
        (one,) = times(f"resnet20/float32/{loop}")
        record.note(one, Outcome(0, 30.0, out=timed(ms, "resnet20", "float32", loop)), False)
    (half,) = times("resnet20/bfloat16/backprop")
    record.note(half, Outcome(0, 3.0, out=timed(5.0, "resnet20", "bfloat16", "x", None)), False)
    record.note(Piece("tests", "tests/lm", ("true",), 1.0), Outcome(0, 3.4), False)
    text = tables.markdown(record.machine, record.settings, record.rows)
    assert text.startswith("# Test GPU\n\nOne of 1 gpu devices, 80 GB; 16 cores; Python 3.11")
    assert "1 of 1 passed." in text
    assert "| lm | passed | 3 |" in text
    assert "0.27 M parameters, 32x32, batch 128, SGD." in text
    assert "| backprop | 10 (9 to 11) | 1.00 | 2.50 | 5 (4.5 to 5.5) | 1.00 |  |" in text
    assert "| FDG, K = 4, compiled | 12 (10.8 to 13.2) | 1.20 | 2.50 |  |  |  |" in text
    assert "| FDG, K = 4, dispatched | 20 (18 to 22) | 2.00 | 2.50 |" in text
    assert "rehearsal" not in text
    compiled = chart.series(record.rows, "resnet20", "float32", "compiled")
    assert compiled == [(1, pytest.approx(1.1)), (4, pytest.approx(1.2))]
    dispatched = chart.series(record.rows, "resnet20", "float32", "dispatched")
    assert dispatched == [(1, pytest.approx(1.1)), (4, pytest.approx(2.0))]
    for rows in (record.rows, {}):
        with Image.open(io.BytesIO(chart.draw(record.machine, rows))) as picture:
            assert picture.width > 400


def test_foreign_folders_and_other_settings_are_refused(record, tmp_path):
    accelerator.save(record, 0)
    path = record.path
    with pytest.raises(UsageError, match=r"^--epochs=2: .* was begun with 300; give that to go"):
        Record(str(path), {**record.settings, "epochs": 2})
    with pytest.raises(UsageError, match=r"device_kind Test GPU, this machine has H; name another"):
        Record(str(path), record.settings).of_machine({**MACHINE, "device_kind": "H"})
    (path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds something else \(thesis.tex\); name an empty"):
        again(record)
    (path / "thesis.tex").unlink()
    (tmp_path / "other" / "training").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"holds something else \(training\)"):
        Record(str(tmp_path / "other"), record.settings)
    (path / "accelerator.json").write_text("[")
    with pytest.raises(UsageError, match=r"accelerator.json cannot be read"):
        again(record)


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
    tokens = work.images
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
