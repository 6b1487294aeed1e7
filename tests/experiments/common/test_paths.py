"""Paths that programs are given: ``~`` is the user's home, and other file systems are refused."""

import pathlib

import pytest

from experiments import export, report
from experiments.common import workdir
from experiments.common.errors import UsageError
from experiments.comparing import records
from experiments.data import cache
from experiments.images.settings import Settings

REMOTE = ["gs://bucket/run", "s3://bucket", "hdfs://host/run", "file:///tmp/run", "~nobody-here/x"]


@pytest.mark.parametrize("name", REMOTE)
def test_what_is_no_local_path_is_refused_and_nothing_is_made(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FDG_CACHE_DIR", name)
    for use in (
        lambda: workdir.check(name, overwrite=False),
        lambda: workdir.Workdir(name, overwrite=False),
        lambda: export.place(name, overwrite=False),
        lambda: report.write([], name),
        cache.directory,
    ):
        with pytest.raises(UsageError, match=r"=.*(is no local folder|home)"):
            use()
    assert not list(tmp_path.iterdir())


def test_home_is_expanded_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FDG_CACHE_DIR", "~/cache")
    assert cache.directory() == tmp_path / "cache"
    assert workdir.Workdir("~/run", overwrite=False).path == tmp_path / "run"
    assert workdir.local_path("~/run", "--output") == tmp_path / "run"
    (tmp_path / "run" / "config.json").write_text("no JSON")
    with pytest.raises(UsageError, match="cannot be read"):
        records.finished(Settings(workdir="~/run"))
    assert not pathlib.Path("~").exists()
