"""The runs of a series: their commands and results."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from experiments.common.errors import UsageError
from experiments.tasks import TASKS
from experiments.training import methods
from experiments.training.config import FREE, Config


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run: results, evaluations and environment.

    ``metric``, "error" or "loss", is the quantity of ``value``, ``best`` and the curve. Non-finite
    values are stored as infinity. ``speed`` is in images or bytes per second.
    """

    folder: str
    method: str
    stages: int
    remedy: str
    beta: float
    seed: int
    split: str
    metric: str
    error: float
    loss: float
    best: float
    seconds: float
    speed: float
    steps: int
    params_sha256: str
    curve: list[dict[str, float]]
    environment: dict[str, Any]

    @classmethod
    def read(
        cls,
        folder: str,
        program: str,
        config: dict[str, Any],
        summary: dict[str, Any],
        metrics: Sequence[dict[str, Any]],
    ) -> Record:
        """Creates a record from the contents of a run's files."""
        task = TASKS[program]
        metric = task.metric
        split = "test" if f"test_{metric}" in summary else "validation"
        points = [m for m in metrics if m["split"] == split]
        places = ("versions", "device_kind", "machine", "cores", "devices")
        return cls(
            folder,
            config["method"],
            config["num_stages"],
            config.get("remedy", "none"),  # missing in runs older than the flag
            config["beta"],
            config["seed"],
            split,
            metric,
            _number(summary[f"{split}_error"]),
            _number(summary[f"{split}_loss"]),
            _number(summary[f"best_{split}_{metric}"]),
            summary["train_seconds"],
            summary[f"{task.unit}_per_second"],
            summary["steps"],
            summary["params_sha256"],
            [
                {"epoch": m["epoch"], "seconds": m["seconds"], "value": _number(m[metric])}
                for m in points
            ],
            {name: config.get(name) for name in places},
        )

    @property
    def value(self) -> float:
        """The result: the error, or the loss."""
        return self.error if self.metric == "error" else self.loss

    @property
    def choosing(self) -> bool:
        """Whether the run was used to select beta."""
        return self.folder.startswith("choose_")


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def finished(config: Config) -> Record | None:
    """The run in ``config.workdir``, or None if unfinished.

    Raises:
      UsageError: the run there has other settings.
    """
    folder = pathlib.Path(config.workdir).expanduser()
    try:
        there = json.loads((folder / "config.json").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{folder}: cannot be read ({error}); delete it") from error
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, value in json.loads(json.dumps(dataclasses.asdict(config))).items():
        # Runs older than a setting had its default.
        other = there.get(name, json.loads(json.dumps(defaults[name], default=str)))
        if name not in FREE and other != value:
            raise UsageError(
                f"{folder}: was run with --{name}={other}, not --{name}={value}; name another "
                "--workdir, give the same settings, or run it anew with --overwrite"
            )
    metrics = [json.loads(line) for line in lines]
    return Record.read(folder.name, config.PROGRAM, there, summary, metrics)


def arguments(config: Config, *, overwrite: bool) -> list[str]:
    """The command that trains ``config`` in its own process, since K determines the devices."""
    found = [sys.executable, "-m", f"experiments.{config.PROGRAM}"]
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, tuple):
            value = ",".join(repr(v) for v in value)
        if value is not None and name != "overwrite":
            found.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return [*found, "--overwrite"] if overwrite else found


def train(command_line: list[str]) -> tuple[int, str]:
    """Exit status and stderr of a run."""
    done = subprocess.run(
        command_line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, done.stderr


def describe(config: Config) -> str:
    """A run as text for the console."""
    beta = f"  beta={config.beta:g}" if methods.METHODS[config.method].shrinks else ""
    held = "  (choosing beta)" if pathlib.Path(config.workdir).name.startswith("choose_") else ""
    remedy = f"  remedy={config.remedy}" if config.remedy != "none" else ""
    return f"{config.method}  K={config.num_stages}{remedy}{beta}  seed={config.seed}{held}"
