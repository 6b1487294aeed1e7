"""Measures the cost of staleness: the additional steps to reach the same loss.

    python -m experiments.staleness --study=experiments/flags/staleness_text.toml --workdir=runs/s

A study is a TOML file with rows of flags of experiments.cifar or experiments.lm (see
experiments/comparing/study.py). Trains all missing runs; repeat the command to resume. --jobs=2
trains two runs at a time, one core each, so times are not comparable. Writes results.json,
table.md, staleness.png and the runs.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from absl import flags

from experiments.common import command, machine, workdir
from experiments.common.errors import UsageError
from experiments.comparing import overhead, study
from experiments.comparing.study import Run, Study

FLAGS = flags.FLAGS
STDERR_LINES = 8
FILES = ("results.json", "table.md", "staleness.png")

Found = dict[tuple[str, int], dict[str, Any]]


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    flags.DEFINE_string("study", "", "TOML file with the rows.", flag_values=values)
    flags.DEFINE_string("workdir", "", "Directory for results and runs.", flag_values=values)
    text = "Number of parallel runs, one core each; 1: one run on all cores."
    flags.DEFINE_integer("jobs", 1, text, flag_values=values)
    text = "Flags for all rows, such as --dataset=folder:DIR; flags of a row take precedence."
    flags.DEFINE_multi_string("extra", [], text, flag_values=values)
    text = "Fraction of the baseline's steps at which its loss is the target."
    flags.DEFINE_float("fraction", 0.5, text, flag_values=values)
    text = "Only rewrite results, table and picture."
    flags.DEFINE_bool("report_only", False, text, flag_values=values)


def report(folder: pathlib.Path, plan: Study, found: Found, fraction: float) -> None:
    """Writes results.json, table.md and staleness.png atomically."""
    rows = overhead.rows(plan, found, fraction)
    machines: list[dict[str, Any]] = []
    for run in found.values():
        names = ("versions", "device_kind", "machine", "cores", "devices")
        about = {name: run["config"].get(name) for name in names}
        if about not in machines:
            machines.append(about)
    results = {"study": plan.text, "fraction": fraction, "machines": machines, "rows": rows}
    contents = (
        (json.dumps(results, indent=1) + "\n").encode(),
        overhead.table(plan, rows, fraction).encode(),
        overhead.draw(plan, rows, fraction),
    )
    for name, content in zip(FILES, contents, strict=True):
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)


class Workers:
    """Trains runs in separate processes, several at a time.

    Args:
      jobs: number of simultaneous runs; if more than one, each has its own core.
    """

    def __init__(self, jobs: int) -> None:
        self._cores = queue.SimpleQueue[int | None]()
        for core in sorted(os.sched_getaffinity(0))[:jobs]:
            self._cores.put(core if jobs > 1 else None)
        self._lock, self._stopped = threading.Lock(), False
        self._running: set[subprocess.Popen[str]] = set()
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)

    def train(self, run: Run) -> tuple[int, str, float]:
        """Exit status, stderr and seconds of a run."""
        core = self._cores.get()
        try:
            if core is not None:
                os.sched_setaffinity(0, {core})  # for this thread and its child processes
            began = time.monotonic()
            process = self._start(run)
            errors = process.communicate()[1]
        finally:
            self._cores.put(core)
        with self._lock:
            self._running.discard(process)
        return process.returncode, errors, time.monotonic() - began

    def _start(self, run: Run) -> subprocess.Popen[str]:
        with self._lock:
            if self._stopped:
                raise concurrent.futures.CancelledError
            # Its own session, so that Ctrl-C only reaches the study, which then stops its runs.
            process = subprocess.Popen(
                run.command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._running.add(process)
        return process

    def stop(self) -> None:
        """Starts no more runs and waits for active ones to stop."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()
        self.pool.shutdown(cancel_futures=True)


def run_study(
    plan: Study, folder: pathlib.Path, jobs: int, fraction: float, report_only: bool
) -> int:
    """Trains missing runs and writes the results after each; returns the exit status.

    Raises:
      UsageError: an invalid row, or a folder contains a run with other settings.
    """
    runs = plan.runs(str(folder))
    found: Found = {}
    missing = []
    for run in runs:
        there = study.finished(run)
        if there is None:
            missing.append(run)
        else:
            found[run.row.name, run.seed] = there
    print(f"{len(found)} runs finished, {len(missing)} remaining", flush=True)
    if report_only and not found:
        raise UsageError(f"--workdir={folder}: holds no finished run; leave --report_only out")
    failed = []
    if missing and not report_only:
        folder.mkdir(parents=True, exist_ok=True)
        began, workers = time.monotonic(), Workers(jobs)
        try:
            waiting = {workers.pool.submit(workers.train, run): run for run in missing}
            for count, done in enumerate(concurrent.futures.as_completed(waiting), 1):
                run, (status, errors, seconds) = waiting[done], done.result()
                there = study.finished(run) if status == 0 else None
                left = len(missing) - count
                minutes = math.ceil(left * (time.monotonic() - began) / count / 60)
                head = f"{count}/{len(missing)}  {overhead.describe(run.row, run.seed)}  "
                if there is None:
                    failed.append(run.settings.workdir)
                    tail = "\n".join("    " + s for s in errors.splitlines()[-STDERR_LINES:])
                    print(f"{head}FAILED with status {status}:\n{tail}", flush=True)
                    continue
                found[run.row.name, run.seed] = there
                report(folder, plan, found, fraction)
                last = overhead.curve(there["metrics"], plan.metric)[-1][1]
                more = f"  about {minutes} min left" if left else ""
                print(f"{head}{plan.metric} {last:.4f}  {seconds:.0f} s{more}", flush=True)
        finally:
            workers.stop()
    if found:
        report(folder, plan, found, fraction)
        print((folder / "table.md").read_text(), end="")
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main() -> None:
    for name in ("study", "workdir"):
        if not FLAGS[name].value:
            raise UsageError(f"--{name}: is missing; see --help")
    if not 0 < FLAGS.fraction <= 1:
        raise UsageError(f"--fraction={FLAGS.fraction}: must lie in (0, 1]; 0.5 is usual")
    cores = machine.cores()
    if not 1 <= FLAGS.jobs <= cores:
        raise UsageError(
            f"--jobs={FLAGS.jobs}: must lie in 1..{cores}, the cores that there are; each run has "
            "one of its own"
        )
    found = study.read(FLAGS.study)
    found = study.with_flags(found, FLAGS.extra)
    workdir.check(FLAGS.workdir, overwrite=True)
    # A run must not outlive the study that started it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = pathlib.Path(FLAGS.workdir).expanduser()
    sys.exit(run_study(found, folder, FLAGS.jobs, FLAGS.fraction, FLAGS.report_only))


if __name__ == "__main__":
    define_flags()
    command.run(main)
