"""Compares methods: trains all missing combinations, then writes tables and plots.

    python -m experiments.compare --flagfile=experiments/flags/compare_quick.cfg --workdir=DIR

Accepts every flag of experiments.cifar (with --program=lm those of experiments.lm), applied to all
runs, and the lists below. Repeat the command to resume an interrupted series.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from experiments.common import command, workdir
from experiments.common.errors import UsageError
from experiments.comparing import bands, paper
from experiments.comparing.records import Record, arguments, describe, finished, train
from experiments.tasks import PROGRAMS, TASKS, program_flag
from experiments.training import methods, remedies
from experiments.training.config import Config
from experiments.training.shown import number
from fdg_jax.partition import units_of

# Flags of a run that are replaced by the lists below.
LISTED = {
    "method": "methods",
    "num_stages": "stages",
    "remedy": "remedies",
    "beta": "betas",
    "seed": "seeds",
}
# The lists: default and meaning.
LISTS: dict[str, tuple[list[str], str]] = {
    "methods": (["backprop", "fdg"], f"Any of {', '.join(methods.METHODS)}."),
    "stages": (["2"], "Numbers of stages K; backprop always runs once with K = 1."),
    "remedies": (["none"], f"Any of {', '.join(remedies.REMEDIES)}, for methods with staleness."),
    "betas": (["1"], "Shrinking factors of the methods that shrink."),
    "seeds": (["0", "1", "2"], "Seeds; all combinations of the first seed run first."),
    "reach": ([], "Errors in percent, or losses; table.md lists the seconds to reach each."),
    "choose_seeds": ([], "Seeds for --choose_beta; default: the first of --seeds."),
}
OPTIONS = ("choose_beta", "choose_validation_size", "limit_minutes", "report_only")
STDERR_LINES = 8

Runner = Callable[[list[str]], tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class Series:
    """A series of runs: common settings, and the lists."""

    common: Config
    methods: tuple[str, ...]
    stages: tuple[int, ...]
    remedies: tuple[str, ...]
    betas: tuple[float, ...]
    seeds: tuple[int, ...]
    reach: tuple[float, ...] = ()
    choose_seeds: tuple[int, ...] = ()
    choose_validation_size: int = 0
    choose_beta: bool = False
    limit_minutes: float = 0.0
    report_only: bool = False

    def configs(self, betas: Sequence[float], seeds: Sequence[int]) -> list[Config]:
        """All combinations in execution order: all of one seed, then the next."""
        found = []
        for seed in seeds:
            for method in self.methods:
                for k in (1,) if method == "backprop" else self.stages:
                    for remedy in self.remedies if methods.METHODS[method].stale else ("none",):
                        for beta in betas if methods.METHODS[method].shrinks else (1.0,):
                            found.append(self._config(method, k, remedy, beta, seed))
        return found

    def choosing(self) -> list[Config]:
        """The runs on the validation split that select beta."""
        return [
            dataclasses.replace(
                config,
                validation_size=self.choose_validation_size,
                workdir=str(
                    pathlib.Path(self.common.workdir)
                    / f"choose_{pathlib.Path(config.workdir).name}"
                ),
            )
            for config in self.configs(self.betas, self.choose_seeds if self.choose_beta else ())
            if methods.METHODS[config.method].shrinks
        ]

    def final(self, choice: dict[str, Any]) -> list[Config]:
        """The compared runs; with a selected beta only 1 and the selected one."""
        if not self.choose_beta:
            return self.configs(self.betas, self.seeds)
        betas = sorted({1.0, *self.betas}, reverse=True)
        best = {key: entry["best"] for key, entry in choice.items()}
        return [
            config
            for config in self.configs(betas, self.seeds)
            if config.beta
            in (1.0, best.get(paper.key(config.method, config.num_stages, config.remedy)))
        ]

    def _config(self, method: str, k: int, remedy: str, beta: float, seed: int) -> Config:
        mended = f"_{remedy}" if remedy != "none" else ""
        shrunk = f"_beta{beta:g}" if methods.METHODS[method].shrinks else ""
        name = f"{method}_k{k}{mended}{shrunk}_seed{seed}"
        folder = str(pathlib.Path(self.common.workdir) / name)
        values: dict[str, Any] = {"method": method, "num_stages": k, "beta": beta, "seed": seed}
        values["remedy"] = remedy
        return dataclasses.replace(self.common, **values, workdir=folder, overwrite=False)


def run(series: Series, runner: Runner = train) -> int:
    """Trains missing runs and writes the results after each; returns the exit status.

    Raises:
      UsageError: a folder contains a run with other settings.
    """
    records: dict[str, Record] = {}
    choosing = series.choosing()
    folder = pathlib.Path(series.common.workdir).expanduser()
    spent: list[float] = []
    failed: list[str] = []
    began = time.monotonic()

    def missing(configs: Sequence[Config]) -> list[Config]:
        """Adds finished runs to the records and returns the others."""
        found = []
        for config in configs:
            try:
                record = finished(config)
            except UsageError:
                if not series.common.overwrite or series.report_only:
                    raise
                record = None
            if record is None:
                found.append(config)
            else:
                records[record.folder] = record
        return found

    def choice() -> dict[str, Any]:
        return paper.choose(choosing, list(records.values()))

    def report() -> None:
        settings = json.loads(json.dumps(dataclasses.asdict(series)))
        settings["program"] = series.common.PROGRAM
        bands.write(folder, settings, choice(), list(records.values()))

    def go(configs: list[Config], later: int) -> int:
        """Trains sequentially; returns the number of runs beyond the time limit."""
        for i, config in enumerate(configs):
            if 0 < series.limit_minutes * 60 <= time.monotonic() - began:
                return len(configs) - i
            start = time.monotonic()
            # An interrupted run resumes from its newest checkpoint, unless --overwrite is given.
            overwrite = series.common.overwrite
            status, errors = runner(arguments(config, overwrite=overwrite))
            spent.append(time.monotonic() - start)
            record = finished(config) if status == 0 else None
            left = len(configs) - i - 1 + later
            done = len(records) + len(failed) + 1
            head = f"{done}/{done + left}  {describe(config)}  "
            if record is None:
                failed.append(config.workdir)
                tail = "\n".join("    " + s for s in errors.splitlines()[-STDERR_LINES:])
                print(f"{head}FAILED with status {status}:\n{tail}", flush=True)
                continue
            records[record.folder] = record
            report()
            minutes = math.ceil(left * statistics.fmean(spent) / 60)
            print(
                f"{head}{record.split} {record.metric} {number(record.metric, record.value)}  "
                f"{record.seconds:.0f} s training, {spent[-1]:.0f} s in all"
                + (f"  about {minutes} min left" if left else ""),
                flush=True,
            )
        return 0

    # Raises all usage errors before the first run, for every beta that may be selected.
    missing(series.configs(sorted({1.0, *series.betas}), series.seeds))
    records.clear()
    first = missing(choosing)
    final = missing(series.final(choice()))
    print(f"{len(records)} runs finished, {len(first) + len(final)} remaining", flush=True)
    if not series.report_only:
        left = go(first, len(final))
        # With beta selected, the remaining runs are known.
        left += go(missing(series.final(choice())), 0)
        if left:
            print(f"time limit reached with {left} runs remaining; repeat the command to resume")
    elif not records:
        raise UsageError(f"--workdir={folder}: holds no finished run; leave --report_only out")
    if records:
        report()
        for key, entry in choice().items():
            print(f"beta chosen for {key}: {entry['best']:g}")
        print(f"results in {folder / 'table.md'}")
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the lists and the flags of a series."""
    text = "The program to run, experiments.PROGRAM; its flags are accepted here."
    flags.DEFINE_enum("program", "cifar", list(TASKS), text, flag_values=values)
    for name, (default, text) in LISTS.items():
        flags.DEFINE_list(name, default, text, flag_values=values)
    text = (
        "Select beta from --betas on images held out of the training split, for each method, K "
        "and remedy; then train and test only beta 1 and the selected one on the whole split."
    )
    flags.DEFINE_bool("choose_beta", False, text, flag_values=values)
    text = "Images held out for --choose_beta; 0: a tenth of the training split."
    flags.DEFINE_integer("choose_validation_size", 0, text, flag_values=values)
    text = "Start no more runs after this time; 0: no limit."
    flags.DEFINE_float("limit_minutes", 0.0, text, flag_values=values)
    text = "Only rewrite results, table and plots."
    flags.DEFINE_bool("report_only", False, text, flag_values=values)


def from_flags(parsed: flags.FlagValues = flags.FLAGS) -> Series:
    """The series given by the flags; raises `UsageError` for invalid values."""
    if not parsed["workdir"].value:
        raise UsageError("--workdir: is missing; name the folder for the results")
    for name, instead in LISTED.items():
        if parsed[name].present:
            raise UsageError(f"--{name}: is set for each run; give --{instead} instead")
    given: dict[str, Any] = {name: parsed[name].value for name in (*LISTS, *OPTIONS)}
    given["choose_seeds"] = given["choose_seeds"] or given["seeds"][:1]
    names: tuple[str, ...] = tuple(dict.fromkeys(given["methods"]))
    for name in names:
        if name not in methods.METHODS:
            allowed = ", ".join(methods.METHODS)
            raise UsageError(f"--methods={name}: no such method; allowed are {allowed}")

    def numbers(flag: str, kind: Callable[[str], Any], least: float, most: float) -> Any:
        try:
            values = tuple(dict.fromkeys(kind(v) for v in given[flag]))
        except ValueError:
            values = (math.nan,)
        if not all(least <= v <= most for v in values):
            bounds = f"{least:g} or more" if most == math.inf else f"above 0 and at most {most:g}"
            raise UsageError(f"--{flag}={','.join(given[flag])}: give numbers, {bounds}")
        return values

    series = Series(
        PROGRAMS[str(parsed["program"].value)].from_flags(parsed),
        names,
        stages=numbers("stages", int, 1, math.inf),
        remedies=tuple(dict.fromkeys(given["remedies"])),
        betas=numbers("betas", float, sys.float_info.min, 1),
        seeds=numbers("seeds", int, 0, math.inf),
        reach=numbers("reach", float, sys.float_info.min, 100),
        choose_seeds=numbers("choose_seeds", int, 0, math.inf),
        **{name: given[name] for name in OPTIONS},
    )
    for name in ("methods", "stages", "remedies", "betas", "seeds"):
        if not getattr(series, name):
            raise UsageError(f"--{name}=: give at least one")
    for name in ("choose_validation_size", "limit_minutes"):
        if not 0 <= given[name] < math.inf:
            raise UsageError(f"--{name}={given[name]}: must be 0 or more")
    if series.choose_beta and series.common.validation_size:
        raise UsageError(
            f"--validation_size={series.common.validation_size}: with --choose_beta the runs that "
            "are compared are tested; give --choose_validation_size instead"
        )
    for config in series.configs(series.betas, series.seeds):
        config.check()
    return series


def check(series: Series) -> Series:
    """Checks ``series`` against network, data and disk, and sets the validation split's size."""
    common = series.common
    if not series.report_only:
        workdir.check(common.workdir, overwrite=True)
    elif series.choose_validation_size or not series.choose_beta:
        return series
    # Loading also fills the cache of decoded images, before any time is measured.
    task = TASKS[common.PROGRAM](common)
    units = len(units_of(task.layers))
    cut = [methods.num_stages(c) for c in series.configs(series.betas, series.seeds)]
    if max(cut) > units:
        remedy = f"{common.model} has {units} layers that can be split, so choose 1 to {units}"
        raise UsageError(f"--stages={max(series.stages)}: {remedy}")
    if not series.choose_beta:
        return series
    held = task.held_for_choice(series.choose_validation_size)
    return dataclasses.replace(series, choose_validation_size=held)


def main() -> None:
    # A run must not outlive the series that started it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(run(check(from_flags())))


if __name__ == "__main__":
    PROGRAMS[program_flag(sys.argv[1:])].define_flags()
    define_flags()
    command.run(main)
