"""A run's files on a disk that is full, and after it."""

import errno
import json
import pathlib
import threading

import pytest

from experiments.common import workdir
from experiments.common.errors import UsageError


@pytest.fixture
def out(tmp_path) -> workdir.Workdir:
    return workdir.Workdir(str(tmp_path / "run"), overwrite=False)


def test_metrics_on_a_full_disk_end_the_run_in_one_line(out, monkeypatch):
    (out.path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(workdir, "PATIENCE", 0.0)
    with pytest.raises(UsageError, match=r"metrics\.jsonl cannot be written \(No space left"):
        out.append_metrics({"step": 1})
    assert out.lines == 0


def test_metrics_wait_for_a_checkpoint_that_does_not_fit(out, monkeypatch):
    path = out.path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    monkeypatch.setattr(workdir, "PATIENCE", 120.0)
    timer = threading.Timer(0.5, path.unlink)
    timer.start()
    out.append_metrics({"step": 1})
    timer.join()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}]


def test_a_line_that_was_cut_off_is_taken_back(out, monkeypatch):
    out.append_metrics({"step": 1})
    path = out.path / "metrics.jsonl"
    whole = path.read_bytes()

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            with open(path, "ab") as file:
                file.write(b'{"st')
            raise OSError(errno.ENOSPC, "No space left on device")

        def write(self, text):
            del text

    monkeypatch.setattr(workdir, "PATIENCE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", lambda *_: Full())
        with pytest.raises(UsageError, match="cannot be written"):
            out.append_metrics({"step": 2})
    assert path.read_bytes() == whole


def test_other_files_appear_whole_or_not_at_all(out):
    out.write_json("summary.json", {"a": 1})
    (out.path / ".summary.json.tmp").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"summary\.json cannot be written \(No space left"):
        out.write_json("summary.json", {"a": 2})
    assert workdir.read_json(str(out.path), "summary.json") == {"a": 1}
    assert [p.name for p in out.path.iterdir()] == ["summary.json"]
