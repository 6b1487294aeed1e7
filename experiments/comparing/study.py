"""A study: rows of runs, each with its flags, read from a TOML file.

title = "A transformer on text"
program = "lm"                       # or "cifar"
metric = "loss"                      # or "error"
seeds = [0, 1, 2]
flags = ["--flagfile=experiments/flags/lm_quick.cfg"]      # for all rows

[[rows]]
name = "backprop, AdamW"
flags = ["--method=backprop", "--num_stages=1"]

[[rows]]
name = "FDG, AdamW"
baseline = "backprop, AdamW"         # the row it is compared with; default: itself
flags = ["--method=fdg", "--num_stages=4"]
grid = [["--learning_rate=1e-3", "--learning_rate=2e-3"], ["--beta=0.5", "--beta=1"]]    # four rows
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import re
import sys
import tomllib
from typing import Any

from absl import flags

from experiments.common.errors import UsageError
from experiments.tasks import PROGRAMS
from experiments.training.config import FREE

METRICS = ("loss", "error")
_STUDY = {"title": str, "program": str, "metric": str, "seeds": list, "flags": list, "rows": list}
_ROW = {"name": str, "baseline": str, "series": str, "flags": list, "grid": list}


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that only differ in their seeds.

    Attributes:
      name: its name in tables.
      baseline: name of the row that it is compared with.
      series: rows of one series form a line of the picture.
      flags: its own flags, after those of all rows.
    """

    name: str
    baseline: str
    series: str
    flags: tuple[str, ...]

    @property
    def folder(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "_", self.name.lower()).strip("_")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a study: row, seed, and the resulting settings."""

    row: Row
    seed: int
    settings: Any
    command: list[str]


@dataclasses.dataclass(frozen=True)
class Study:
    """A parsed study file; ``text`` is its source."""

    title: str
    program: str
    metric: str
    seeds: tuple[int, ...]
    flags: tuple[str, ...]
    rows: tuple[Row, ...]
    text: str

    def runs(self, workdir: str) -> list[Run]:
        """All runs, seed by seed.

        Raises:
          UsageError: a row has invalid flags; the message names the row.
        """
        return [self._run(row, seed, workdir) for seed in self.seeds for row in self.rows]

    def _run(self, row: Row, seed: int, workdir: str) -> Run:
        folder = pathlib.Path(workdir) / f"{row.folder}_seed{seed}"
        given = [*self.flags, *row.flags, f"--seed={seed}", f"--workdir={folder}"]
        program = PROGRAMS[self.program]
        values = flags.FlagValues()
        flags.DEFINE_list("flagfile", [], "", flag_values=values)
        program.define_flags(values)
        try:
            for name in ("seed", "workdir"):
                if any(re.fullmatch(f"--?{name}(=.*)?", flag) for flag in given[:-2]):
                    raise UsageError(f"--{name}: the study gives it; leave it out")
            rest = values([self.program, *values.read_flags_from_files(given)])
            if len(rest) > 1:
                raise UsageError(f"{rest[1]}: not a flag; flags are written --name=value")
            settings = program.from_flags(values)
            settings.check()
        except (flags.Error, UsageError, OSError, UnicodeError) as error:
            raise UsageError(f"--study: row {row.name!r}: {error}") from error
        command = [sys.executable, "-m", f"experiments.{self.program}", *given]
        return Run(row, seed, settings, command)


def read(path: str) -> Study:
    """Reads a study from a file.

    Raises:
      UsageError: it cannot be read, or is not a valid study.
    """
    try:
        text = pathlib.Path(path).expanduser().read_text()
        found = tomllib.loads(text)
    except (OSError, UnicodeError, RuntimeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--study={path}: cannot be read ({error}); give a TOML file") from error
    _fit(path, "the study", found, _STUDY, ("title", "program", "seeds", "rows"))
    if found["program"] not in PROGRAMS:
        _refuse(path, f"program={found['program']!r}", f"allowed are {', '.join(PROGRAMS)}")
    metric = found.get("metric", "loss")
    if metric not in METRICS:
        _refuse(path, f"metric={metric!r}", f"allowed are {', '.join(METRICS)}")
    seeds = found["seeds"]
    if not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        _refuse(path, f"seeds={seeds}", "give at least one whole number, 0 or more")
    if len(set(seeds)) < len(seeds):
        _refuse(path, f"seeds={seeds}", "give each once")
    rows = []
    for entry in found["rows"]:
        _fit(path, "a row", entry, _ROW, ("name",))
        name = entry["name"]
        own = tuple(map(str, entry.get("flags", [])))
        for chosen in _grid(path, entry):
            # "FDG, learning_rate=1e-3 b1=0.5"
            called = ", ".join([name, *([" ".join(chosen).replace("--", "")] if chosen else [])])
            baseline, series = entry.get("baseline", called), entry.get("series", called)
            each = tuple(flag for choice in chosen for flag in choice.split())
            rows.append(Row(called, baseline, series, (*own, *each)))
    names = [row.name for row in rows]
    folders = [row.folder for row in rows]
    for row in rows:
        if folders.count(row.folder) > 1:
            _refuse(path, f"row {row.name!r}", "is there twice, or nearly; give it another name")
        if row.baseline not in names:
            _refuse(path, f"baseline={row.baseline!r}", f"is no row; there are {', '.join(names)}")
    if not rows:
        _refuse(path, "rows", "are missing; give at least one [[rows]]")
    common = tuple(map(str, found.get("flags", [])))
    return Study(found["title"], found["program"], metric, tuple(seeds), common, tuple(rows), text)


def with_flags(study: Study, extra: list[str]) -> Study:
    """The study with additional flags for all rows."""
    return dataclasses.replace(study, flags=(*study.flags, *extra))


def finished(run: Run) -> dict[str, Any] | None:
    """The result of a run, or None if unfinished.

    Returns:
      "config" and "summary" as in its files, and "metrics", the lines of metrics.jsonl.

    Raises:
      UsageError: the run there has other settings.
    """
    folder = pathlib.Path(run.settings.workdir).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{folder}: cannot be read ({error}); delete it") from error
    defaults = {field.name: field.default for field in dataclasses.fields(run.settings)}
    for name, value in json.loads(json.dumps(dataclasses.asdict(run.settings))).items():
        # Runs older than a setting had its default.
        other = config.get(name, json.loads(json.dumps(defaults[name], default=str)))
        if name not in FREE and other != value:
            raise UsageError(
                f"{folder}: was run with --{name}={other}, not --{name}={value}; name another "
                "--workdir, or delete the folder"
            )
    return {"config": config, "summary": summary, "metrics": metrics}


def _grid(path: str, entry: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every combination of a row's alternatives; one empty combination without a grid."""
    grid = entry.get("grid", [])
    for axis in grid:
        if not isinstance(axis, list) or not axis or not all(isinstance(a, str) for a in axis):
            what = f"grid of row {entry['name']!r}: {axis!r}"
            _refuse(path, what, 'must be a list of flags, such as ["--b1=0.5", "--b1=0.9"]')
    return list(itertools.product(*grid))


def _fit(path: str, what: str, found: Any, kinds: dict[str, Any], needed: tuple[str, ...]) -> None:
    if not isinstance(found, dict):
        _refuse(path, what, "must be a table of names and values")
    for name, value in found.items():
        if name not in kinds:
            _refuse(path, f"{name!r} in {what}", f"is not known; allowed are {', '.join(kinds)}")
        if not isinstance(value, kinds[name]):
            _refuse(path, f"{name}={value!r} in {what}", f"must be a {kinds[name].__name__}")
    for name in needed:
        if name not in found:
            _refuse(path, f"{name!r} in {what}", "is missing")


def _refuse(path: str, what: str, hint: str) -> None:
    raise UsageError(f"--study={path}: {what}: {hint}")
