"""What a record keeps, how the next command goes on, and the files that are written."""

import io
import json

import pytest
from PIL import Image

from experiments import accelerator
from experiments.accelerating import chart, tables
from experiments.accelerating.piece import Outcome, Piece
from experiments.accelerating.record import Record
from experiments.common.errors import UsageError
from tests.experiments.accelerating.fake import MACHINE, Fake, again, timed, times


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
