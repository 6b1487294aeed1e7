"""Runs on disk, finished or not, for the report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from experiments.common.errors import UsageError
from experiments.tasks import settings_of, task_of
from experiments.training import methods, timeline
from experiments.training.task import Task
from fdg_jax.schedule import Schedule

# Required entries of each file.
CONFIG = ("method", "num_stages", "beta", "seed", "total_steps", "stages", "balance", "cost_unit")
METRICS = ("step", "epoch", "split", "loss", "error", "seconds")
SUMMARY = ("split", "train_seconds", "steps", "params_sha256")
PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      name: its name in the report.
      config: its config.json.
      task: its task.
      schedule: the schedule of its method.
      metrics: the lines of its metrics.jsonl.
      summary: its summary.json; None if unfinished.
      figures: the numbers of its timeline.json, or None.
      picture: its timeline.png, or None.
    """

    name: str
    config: dict[str, Any]
    task: type[Task[Any]]
    schedule: Schedule
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    figures: dict[str, Any] | None
    picture: bytes | None

    def lines(self, *, train: bool) -> list[dict[str, Any]]:
        """Lines of the train split, or of the other one."""
        return [m for m in self.metrics if (m["split"] == "train") == train]

    @property
    def state(self) -> str:
        """Its progress."""
        total = self.config["total_steps"]
        if self.summary is not None:
            return f"finished, {total:,} steps"
        done = max((m["step"] for m in self.metrics), default=0)
        return f"unfinished: {done:,} of {total:,} steps seen"

    @property
    def results(self) -> tuple[float | None, float | None] | None:
        """The last and the lowest error or loss, None if not finite; or None before the first
        evaluation."""
        found = [m[self.task.metric] for m in self.lines(train=False)]
        least = min((value for value in found if value is not None), default=None)
        return (found[-1], least) if found else None

    @property
    def seconds(self) -> float | None:
        """Seconds of training so far."""
        if self.summary is not None:
            return float(self.summary["train_seconds"])
        return max((m["seconds"] for m in self.metrics), default=None)

    @property
    def speed(self) -> float | None:
        """Images or bytes per second over the whole training so far, including compilation."""
        if self.summary is not None:
            return float(self.summary[speed_name(self.task)])
        train = self.lines(train=True)
        if not train or not train[-1]["seconds"]:
            return None
        per_batch: float = self.task.per_batch(settings_of(self.config))
        return per_batch * train[-1]["step"] / train[-1]["seconds"]

    @property
    def staleness(self) -> list[int]:
        """The staleness of each stage."""
        return [row["staleness"] for row in self.config["stages"]]


def read(folder: str, name: str) -> Run:
    """Reads the run in ``folder``.

    Raises:
      UsageError: there is no run, or one of its files is damaged.
    """
    path = pathlib.Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise UsageError(
            f"{folder}: holds no run (there is no config.json); give workdirs of experiments.cifar "
            "or experiments.lm"
        )

    def part(file: str, make: Callable[[bytes], Any]) -> Any:
        if not (path / file).exists():
            return None
        try:
            return make((path / file).read_bytes())
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
            raise UsageError(
                f"{folder}: {file} cannot be read ({reason}); put it right, or leave the run out"
            ) from error

    config, task, schedule = part("config.json", _config)
    speed = speed_name(task)
    return Run(
        name,
        config,
        task,
        schedule,
        part("metrics.jsonl", lambda content: _metrics(content, (*METRICS, speed))) or [],
        part("summary.json", lambda content: _checked(json.loads(content), (*SUMMARY, speed))),
        part("timeline.json", lambda content: timeline.read(content.decode())),
        part("timeline.png", _picture),
    )


def speed_name(task: type[Task[Any]]) -> str:
    """The name of the speed in a run's files."""
    return f"{task.unit}_per_second"


def _checked(value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    missing = [name for name in names if name not in value]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    return value


def _config(content: bytes) -> tuple[dict[str, Any], type[Task[Any]], Schedule]:
    value = _checked(json.loads(content), CONFIG)
    task, settings = task_of(value), settings_of(value)
    if settings.method not in methods.METHODS:
        raise ValueError(f"method {settings.method!r} is not known")
    for row in value["stages"]:
        _checked(row, ("stage", "devices", "layers", "parameters", "cost", "delay", "staleness"))
    return value, task, methods.schedule(settings)


def _metrics(content: bytes, names: tuple[str, ...]) -> list[dict[str, Any]]:
    # Text after the last line break is an incomplete line of an active or killed run.
    lines = content.split(b"\n")[:-1]
    return [_checked(json.loads(line), names) for line in lines]


def _picture(content: bytes) -> bytes:
    if not content.startswith(PNG):
        raise ValueError("it is no PNG")
    return content
