"""Runs of experiments.cifar on disk, finished or not."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from experiments.common.errors import UsageError
from experiments.training import methods, timeline
from experiments.training.config import Config, check_experiment
from fdg_jax.schedule import Schedule

# What a report needs of each file, beside what it shows as it stands.
CONFIG = ("method", "num_stages", "beta", "seed", "total_steps", "stages", "balance", "cost_unit")
METRICS = ("step", "epoch", "split", "loss", "error", "images_per_second", "seconds")
SUMMARY = ("split", "train_seconds", "images_per_second", "steps", "params_sha256")
PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      name: what the report calls it.
      config: its config.json.
      schedule: that of its method.
      metrics: the lines of its metrics.jsonl.
      summary: its summary.json; None: it is not finished.
      figures: the numbers of its timeline.json, or None.
      picture: its timeline.png, or None.
    """

    name: str
    config: dict[str, Any]
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
        """How far it came."""
        total = self.config["total_steps"]
        if self.summary is not None:
            return f"finished, {total:,} steps"
        done = max((m["step"] for m in self.metrics), default=0)
        return f"unfinished: {done:,} of {total:,} steps seen"

    @property
    def errors(self) -> tuple[float, float] | None:
        """The last and the least error, or None before the first evaluation."""
        found = [m["error"] for m in self.lines(train=False)]
        return (found[-1], min(found)) if found else None

    @property
    def seconds(self) -> float | None:
        """Of training so far."""
        if self.summary is not None:
            return float(self.summary["train_seconds"])
        return max((m["seconds"] for m in self.metrics), default=None)

    @property
    def images_per_second(self) -> float | None:
        """Over the whole training so far, its compilation included."""
        if self.summary is not None:
            return float(self.summary["images_per_second"])
        train = self.lines(train=True)
        if not train or not train[-1]["seconds"]:
            return None
        images: float = self.config["batch_size"] * train[-1]["step"] / train[-1]["seconds"]
        return images

    @property
    def staleness(self) -> list[int]:
        """Of each stage."""
        return [row["staleness"] for row in self.config["stages"]]


def read(folder: str, name: str) -> Run:
    """The run in ``folder``.

    Raises:
      UsageError: there is none, or one of its files is damaged.
    """
    path = pathlib.Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise UsageError(
            f"{folder}: holds no run (there is no config.json); give workdirs of experiments.cifar"
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

    config, schedule = part("config.json", _config)
    return Run(
        name,
        config,
        schedule,
        part("metrics.jsonl", _metrics) or [],
        part("summary.json", lambda content: _checked(json.loads(content), SUMMARY)),
        part("timeline.json", lambda content: timeline.read(content.decode())),
        part("timeline.png", _picture),
    )


def _checked(value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    missing = [name for name in names if name not in value]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    return value


def _config(content: bytes) -> tuple[dict[str, Any], Schedule]:
    value = json.loads(content)
    if isinstance(value, dict):
        check_experiment(value)
    _checked(value, CONFIG)
    names = {field.name for field in dataclasses.fields(Config)}
    settings = Config(**{name: value[name] for name in names & value.keys()})
    if settings.method not in methods.METHODS:
        raise ValueError(f"method {settings.method!r} is not known")
    for row in value["stages"]:
        _checked(row, ("stage", "devices", "layers", "parameters", "cost", "delay", "staleness"))
    return value, methods.schedule(settings)


def _metrics(content: bytes) -> list[dict[str, Any]]:
    # What follows the last line break is being written, or was when the run was killed.
    lines = content.split(b"\n")[:-1]
    return [_checked(json.loads(line), METRICS) for line in lines]


def _picture(content: bytes) -> bytes:
    if not content.startswith(PNG):
        raise ValueError("it is no PNG")
    return content
