"""Every flagfile can be read, makes its network, and says at its head how it is run."""

import pathlib

import pytest
from absl import flags

import fdg_jax as fdg
from experiments.comparing import study
from experiments.images import settings
from fdg_jax.partition import units_of

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "flags"
FLAGFILES = sorted(
    p for p in FOLDER.glob("*.cfg") if not p.stem.startswith(("compare_", "benchmark_", "lm_"))
)


@pytest.mark.parametrize("path", FLAGFILES, ids=lambda path: path.stem)
def test_flagfile(path):
    values = flags.FlagValues()
    settings.define_flags(values)
    rest = values(["cifar", f"--flagfile={path}", "--workdir=somewhere"])
    assert rest == ["cifar"]
    config = settings.from_flags(values)
    config.check()
    assert len(units_of(fdg.models.create(config.model))) >= config.num_stages
    assert "expected" in path.read_text()
    assert path.stem in path.read_text() or path.stem == "quickstart"
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    "path", [*FLAGFILES, *sorted(FOLDER.glob("compare_*.cfg"))], ids=lambda path: path.stem
)
def test_results_repeat_on_other_machines(path):
    """The default splits by measured time, and so would a flagfile that does not say how."""
    (line,) = [x for x in path.read_text().splitlines() if x.startswith("--partition=")]
    assert line != "--partition=time"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_study(path):
    found = study.read(str(path))
    for run in found.runs("somewhere"):
        assert run.settings.workdir.startswith("somewhere/")
    assert path.stem in path.read_text()
    assert len({row.folder for row in found.rows}) == len(found.rows)
