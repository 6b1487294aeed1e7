"""Compares a run that is killed and restarted with an undisturbed one."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from tests.kills.plan import Order, Setting

ROOT = pathlib.Path(__file__).parents[2]
TIMES = ("images_per_second", "bytes_per_second", "seconds", "train_seconds")
# Time limit of a process in seconds: it takes 7 on two idle cores, up to 240 on busy ones.
DEADLINE = 1200
# The state of a process that was killed before its first log line.
BEFORE = {"moment": "", "main": "start", "save": "none", "step": 0}
# Maximum number of runs until all kills of a setting have happened.
ATTEMPTS = 3


def make_data(folder: pathlib.Path) -> None:
    """A data set of 8x8 images in two classes: five steps of 8 per epoch, two evaluation batches.

    Also a text, a tenth of which is two evaluation batches.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for label in ("a", "b"):
            there = folder / "images" / split / label
            there.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(there / f"{i}.png")
    (folder / "text").write_bytes(rng.choice(list(b"abcdefgh"), 1000).astype(np.uint8).tobytes())


def start(
    setting: Setting, data: pathlib.Path, workdir: pathlib.Path, program: str, **more: str
) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "FDG_CACHE_DIR": str(ROOT / ".cache" / "experiments"),
        **more,
    }
    dataset = f"folder:{data / 'images'}" if setting.program == "cifar" else f"file:{data / 'text'}"
    line = [f"--dataset={dataset}", f"--workdir={workdir}", *setting.flags]
    return subprocess.Popen(
        [sys.executable, "-m", program, *line],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> int:
    """The status of a process that ended by itself or was killed; all others are errors."""
    try:
        out, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    if process.returncode not in (0, -signal.SIGKILL) or "damaged" in errors:
        raise AssertionError(f"status {process.returncode}\n{out}\n{errors}")
    return process.returncode


def attempt(
    setting: Setting, data: pathlib.Path, workdir: pathlib.Path, order: Order | None
) -> dict[str, Any] | None:
    """Starts or resumes a run; returns where it was killed, or None if it ended."""
    log = workdir.with_suffix(".log")
    log.unlink(missing_ok=True)
    kill = order.moment if order else ""
    process = start(
        setting,
        data,
        workdir,
        "tests.kills.watched",
        WATCH_PROGRAM=setting.program,
        WATCH_LOG=str(log),
        WATCH_KILL=kill,
    )

    def lines() -> list[str]:
        return log.read_text().split("\n")[:-1] if log.exists() else []

    try:
        if order and not order.moment:
            deadline = time.monotonic() + DEADLINE
            while len(lines()) < order.lines and process.poll() is None:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{setting.name} hangs after {lines()[-1:]}")
                time.sleep(0.001)
            time.sleep(order.seconds)
            process.kill()
    except BaseException:
        process.kill()
        raise
    if end(process) == 0:
        return None
    where = json.loads(lines()[-1]) if lines() else BEFORE
    if order is None or (kill and kill.rpartition(":")[0] != where["moment"]):
        raise AssertionError(f"{setting.name} was killed by somebody else at {where}")
    whole = [int(path.name[5:]) for path in (workdir / "checkpoints").glob("step-*")]
    return {"how": "aimed" if kill else "outside", **where, "newest": max(whole, default=0)}


def differences(run: pathlib.Path, whole: pathlib.Path) -> list[str]:
    """The differences between two runs, except times."""

    def content(folder: pathlib.Path) -> dict[str, Any]:
        summary = json.loads((folder / "summary.json").read_text())
        metrics = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        return {
            **{n: v for n, v in summary.items() if n not in TIMES},
            "metrics": [{n: v for n, v in x.items() if n not in TIMES} for x in metrics],
            "files": sorted(path.name for path in folder.iterdir()),
            "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        }

    ours, theirs = content(run), content(whole)
    return [n for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n)]


def torment(
    setting: Setting, orders: Sequence[Order], data: pathlib.Path, folder: pathlib.Path
) -> dict[str, Any]:
    """Trains without kills, then with kills at ``orders``; orders that a run did not reach before
    its end are repeated in another run.

    Returns:
      The kills, each with the newest checkpoint from which the next process resumed; the
      differences of each disturbed run from the undisturbed one; orders that no run reached.
    """
    whole = folder / "whole"
    if end(start(setting, data, whole, f"experiments.{setting.program}")) != 0:
        raise AssertionError(f"{setting.name} was killed by somebody else")
    left, kills, outcomes = collections.deque(orders), [], []
    for number in range(ATTEMPTS):
        run, missed = folder / str(number), []
        while True:
            order = left.popleft() if left else None
            where = attempt(setting, data, run, order)
            if where is None:
                missed += [order] if order else []
                break
            kills.append(where)
            print(f"  {setting.name}: {json.dumps(where)}", flush=True)
        outcomes.append(differences(run, whole))
        # After the next order, since an unreached moment may need a kill before it.
        for order in missed:
            left.insert(1, order)
        if not left:
            break
    return {
        **dataclasses.asdict(setting),
        "kills": kills,
        "differences": outcomes,
        "missed": [dataclasses.asdict(order) for order in left],
    }
