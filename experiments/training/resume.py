"""Resuming a stopped run, and stopping a run so that it can be resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np

import fdg_jax as fdg
from experiments.common.errors import UsageError
from experiments.training.config import FREE, Config, program_of
from experiments.training.setup import Setup
from experiments.training.timeline import PROFILE
from experiments.training.writers import WRITERS
from fdg_jax import distributed
from fdg_jax.checkpoint import Checkpointer

FOLDER = "checkpoints"
# The saved data of a run without a checkpoint.
NOTHING: dict[str, Any] = {
    "step": 0,
    "lines": 0,
    "waiting": [],
    "best": math.inf,
    "evaluated": None,
    "clocks": [0.0, 0, 0.0],
}


@dataclasses.dataclass(frozen=True)
class Earlier:
    """An earlier run in the workdir.

    Attributes:
      config: the content of its config.json.
      finished: whether it has a summary.json, which is written last.
    """

    config: dict[str, Any]
    finished: bool


def find(config: Config) -> Earlier | None:
    """The run to resume; None if a new one starts (or will be rejected because of existing files).

    Raises:
      UsageError: the run there has other settings, or its config.json cannot be read.
    """
    if config.overwrite:
        return None
    try:
        folder = pathlib.Path(config.workdir).expanduser()
        path = folder / "config.json"
        if not path.is_file():
            # A new run must not find checkpoints of another run later.
            if (folder / FOLDER).exists():
                raise ValueError("it is missing, but there are checkpoints")
            return None
        if not config.resume:
            return None
        there = json.loads(path.read_text())
        if not isinstance(there, dict) or not {"cuts", "balance"} <= there.keys():
            raise ValueError("it is not that of a run")
        if (program := program_of(there)) != config.PROGRAM:
            raise ValueError(f"it is a run of experiments.{program}")
    except (OSError, RuntimeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"--workdir={config.workdir}: its config.json cannot be read ({error}); name another "
            "folder, or add --overwrite"
        ) from error
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, value in json.loads(json.dumps(dataclasses.asdict(config))).items():
        # Flags newer than the run had their default.
        had = there.get(name, json.loads(json.dumps(defaults[name], default=str)))
        if name not in FREE and had != value:
            raise UsageError(
                f"--{name}={_shown(value)}: the run in {config.workdir} has {name}={_shown(had)}; "
                "give that to go on with it, name another folder, or add --overwrite"
            )
    return Earlier(there, (folder / "summary.json").is_file())


def folders(config: Config) -> tuple[str, ...]:
    """The folders that a new run removes, in addition to files."""
    if config.overwrite and (pathlib.Path(config.workdir).expanduser() / "config.json").is_file():
        return (FOLDER, PROFILE, *WRITERS)
    # Other folders of these names may not belong to a run.
    return (FOLDER,)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        value = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return str(value)[:200]


class Checkpoints:
    """The checkpoints of one run: when they are due, and their data besides the state.

    Args:
      run: the run; its settings determine when and how many.
    """

    def __init__(self, run: Setup) -> None:
        config = run.config
        self._run = run
        self._every = config.checkpoint_every_steps
        self._seconds = 60 * config.checkpoint_every_minutes
        folder = pathlib.Path(config.workdir).expanduser() / FOLDER
        self.checkpointer = Checkpointer(folder, run.pipe, config.keep_checkpoints)
        self._last = time.monotonic()

    def restore(self) -> tuple[fdg.PipelineState, dict[str, Any]] | None:
        """State and extra of the newest intact checkpoint; also restores the loader. None if there
        is no checkpoint.

        Raises:
          UsageError: no checkpoint is intact, or it does not fit the pipeline.
        """
        config, task = self._run.config, self._run.task
        example = task.inputs(config.batch_size), task.targets(config.batch_size)
        try:
            state, extra = self.checkpointer.restore(example)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UsageError(
                f"--workdir={config.workdir}: {error}; --overwrite does that"
            ) from error
        if not _fits(extra, int(state.tick)):
            raise UsageError(
                f"--workdir={config.workdir}: the newest checkpoint does not say where the run "
                "was; add --overwrite, which starts it anew"
            )
        task.loader.set_state(extra["loader"])
        self.checkpointer.tidy()
        return state, extra

    @property
    def on(self) -> bool:
        """Whether checkpoints are saved."""
        return self._every > 0 or self._seconds > 0

    @property
    def late(self) -> bool:
        """Whether a checkpoint is overdue."""
        return 0 < self._seconds <= time.monotonic() - self._last

    def due(self, step: int, *, best: bool, late: bool) -> bool:
        """Whether to save the state after ``step`` steps; ``best``: it is the best so far."""
        if best and self.on:
            return True
        return late or (self._every > 0 and step % self._every == 0)

    def save(
        self,
        state: fdg.PipelineState,
        step: int,
        extra: dict[str, Any],
        score: float | None,
    ) -> None:
        """Starts saving a checkpoint in the background."""
        extra = {"step": step, "loader": self._run.task.loader.get_state(), **extra}
        self.checkpointer.save(state, step, extra, score)
        self._last = time.monotonic()

    def farewell(self, step: int) -> str:
        """The last line of a run stopped after ``step`` steps; waits for the last save."""
        self.checkpointer.close()
        distributed.gather(np.int32(step))  # waits for all processes
        again = (
            "the same command without --overwrite"
            if self._run.config.overwrite
            else "the same command"
        )
        older = "" if self.checkpointer.latest() == step else " from an older checkpoint"
        return f"stopped after step {step}; {again} goes on{older}"


def _fits(extra: Any, step: int) -> bool:
    """Whether ``extra`` has the form that a run saves after ``step`` steps; it is untrusted."""
    match extra:
        case {
            "step": int(there),
            "lines": int(lines),
            "waiting": list(waiting),
            "best": int() | float(),
            "evaluated": None | {"loss": int() | float(), "error": int() | float()},
            "clocks": [int() | float(), int(), int() | float()],
            "loader": {"position": int(position)},
        }:
            parts = [m if isinstance(m, dict) else {} for m in waiting]
            values = [part.get(name) for part in parts for name in ("batch", "loss", "error")]
            for part in parts:
                below = part.get("stage_errors", [])
                values += below if isinstance(below, list) else [None]
            whole = all(isinstance(value, int | float) for value in values)
            return whole and there == position == step and lines >= 0
    return False


class Stop:
    """Records SIGINT and SIGTERM, so that a run can end after a checkpoint.

    Only the first signal is recorded; a second one ends the program immediately, as usual. Has no
    effect outside the main thread, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
