"""Anything for flags and files: it is read, or refused with one line, and nothing is written."""

import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.error

import hypothesis
import pytest
from absl import flags
from hypothesis import strategies as st

from experiments.common import workdir
from experiments.common.errors import UsageError
from experiments.images import settings
from experiments.images.settings import Settings
from experiments.images.task import Images
from experiments.training import measured, resume, setup
from tests.experiments.data.conftest import cache_dir, image_folder
from tests.reliability.mutation import changed_bytes, changed_json, examples, one_line

__all__ = ["cache_dir", "image_folder"]  # fixtures

ROOT = pathlib.Path(__file__).parents[2]
NAMES = [name for name in settings.HELP if name != "workdir"]
WORDS = """
    fdg adl gpipe pipedream_2bw one_f_one_b data_parallel backprop cosine constant milestones time
    flops 1 1,2 2,1 0 0.5 -1 2 3 4 8 80 81 1e300 1e-300 nan inf -inf true false None small_resnet
    resnet20 plain16 wrn10_1 wrn9_1 wrn40_0 tfds:x folder: folder:. cifar10 cifar100 bfloat16 ~ / .
    , ,, ~nobody recompute sum no yes auto 2147483647 2147483648 1_0 ٣"""
VALUES = (
    st.integers(-(2**70), 2**70).map(str)
    | st.floats().map(str)
    | st.text(max_size=12)
    | st.sampled_from([*WORDS.split(), "\udcff", "\0", "\n"])
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise urllib.error.URLError("there is no network")

    monkeypatch.setattr("urllib.request.urlopen", refused)


def until_the_first_file(arguments: list[str], make: bool = True) -> str:
    """Does with flags what `loop.run` does before it writes; says how far that went."""
    values = flags.FlagValues()
    settings.define_flags(values)
    try:
        if len(values(["cifar", *arguments])) > 1:
            return "parsed"
    except (flags.Error, OSError, UnicodeError):  # as `command.run`
        return "flags"
    try:
        config = settings.from_flags(values)
        config.check()
        resume.find(config)
        workdir.check(config.workdir, overwrite=config.overwrite)
        if make:
            setup.make(Images(config))
    except UsageError as error:
        one_line(error)
        return "refused"
    return "made"


@pytest.fixture
def base(image_folder, tmp_path, monkeypatch) -> list[str]:
    """Flags of a run that could begin."""
    # Measuring takes seconds, and none of them says anything about flags.
    times = measured.Times([1.0] * 5, "not measured")
    monkeypatch.setattr(measured, "times", lambda layers, *_: times)
    options = {
        "dataset": f"folder:{image_folder}",
        "data_dir": tmp_path / "data",
        "workdir": tmp_path / "run",
        "partition": "flops",
        "batch_size": 2,
        "steps": 3,
        "num_stages": 2,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def test_the_base_is_accepted(base):
    assert until_the_first_file(base) == "made"
    assert until_the_first_file([*base, "--beta=2"]) == "refused"
    assert until_the_first_file([*base, "--betta=2"]) == "flags"


@examples(0.4)
@hypothesis.given(
    changes=st.lists(st.tuples(st.sampled_from(NAMES), VALUES), min_size=1, max_size=3)
)
def test_flags(base, tmp_path, changes):
    until_the_first_file([*base, *(f"--{name}={value}" for name, value in changes)])
    assert not (tmp_path / "run").exists()


@examples(0.5)
@hypothesis.example("~nobody/x")
@hypothesis.example("x" * 300)
@hypothesis.given(name=st.text(max_size=80) | st.sampled_from(["x" * 300, "~nobody/x", "a/../b"]))
def test_workdirs(base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    until_the_first_file([*base, f"--workdir={name}"], make=False)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@examples(0.5)
@hypothesis.given(
    content=st.binary(max_size=100)
    | st.lists(
        st.sampled_from(
            [
                b"--beta=0.5",
                b"--flagfile=",
                b"--undefok=x",
                b"--x=1",
                b"#",
                b"--beta",
                b"--noflip",
                b"beta=1",
                b"--method=\xff",
                b'--lr_milestones="1',
                b"--",
                b"-h",
                b"--seed\n3",
                b"\0",
            ]
        ),
        max_size=5,
    ).map(b"\n".join)
)
def test_flagfiles(base, tmp_path, content):
    path = tmp_path / "flags.cfg"
    path.write_bytes(content.replace(b"--flagfile=", f"--flagfile={path}".encode()))
    until_the_first_file([*base, f"--flagfile={path}"], make=False)
    assert not (tmp_path / "run").exists()


@examples(0.5)
@hypothesis.given(data=st.data())
def test_settings_of_an_earlier_run(base, tmp_path, data):
    config = Settings(str(tmp_path / "earlier"))
    there = {"workdir": "x", "cuts": [2], "balance": 1.0, "beta": 1.0, "lr_milestones": [150.0]}
    text = json.dumps(changed_json(data.draw, there))
    content = changed_bytes(data.draw, text.encode()) if data.draw(st.booleans()) else text.encode()
    (tmp_path / "earlier").mkdir(exist_ok=True)
    (tmp_path / "earlier" / "config.json").write_bytes(content)
    try:
        resume.find(config)
    except UsageError as error:
        one_line(error)


def program(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.cifar", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        timeout=300,
        check=False,
    )


@examples(0.02)
@hypothesis.given(data=st.data())
def test_the_program_itself(base, tmp_path, data):
    name = data.draw(
        st.sampled_from([*NAMES, "v", "verbosity", "stderrthreshold", "flagfile", "x"])
    )
    value = data.draw(VALUES.filter(lambda text: "\0" not in text))
    # What would be accepted must not be trained: a last flag is refused.
    done = program(*base, f"--{name}={value}", "--momentum=2")
    assert done.returncode == 2, done.stderr
    assert b"Traceback" not in done.stderr
    *_, last = done.stderr.decode(errors="replace").splitlines()
    assert re.match("error: |FATAL", last)
    assert not (tmp_path / "run").exists()
