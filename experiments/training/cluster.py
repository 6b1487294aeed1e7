"""One run in several processes: this process's number, and common decisions."""

from __future__ import annotations

import dataclasses
import os
from collections import deque

import jax
import numpy as np
from absl import flags

import fdg_jax as fdg
from experiments.common import machine
from experiments.common.errors import UsageError
from experiments.training import setup
from experiments.training.config import Config
from experiments.training.resume import Earlier
from fdg_jax import distributed
from fdg_jax.engine.placement import put

AUTO = "auto"
# Settings that may differ between processes on different machines.
OWN = ("data_dir",)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of several processes; without --coordinator there is one."""
    flags.DEFINE_string(
        "coordinator",
        "",
        "host:port where process 0 of a run of several processes listens; auto: as SLURM, Open MPI "
        "or Kubernetes says, --num_processes and --process_id too.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "Processes of the run.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which this is, from 0.", flag_values=values)
    flags.DEFINE_float(
        "connect_seconds",
        distributed.CONNECT_SECONDS,
        "How long processes wait for one another at the start.",
        lower_bound=1.0,
        flag_values=values,
    )


def join(config: Config, values: flags.FlagValues = flags.FLAGS) -> None:
    """Joins the other processes of the run, if any, and checks that their settings agree.

    Args:
      config: the settings of this process.
      values: see `define_flags`.

    Raises:
      UsageError: processes are missing, or their settings differ.
    """
    coordinator, number, own = (
        values[name].value for name in ("coordinator", "num_processes", "process_id")
    )
    seconds = float(values["connect_seconds"].value or distributed.CONNECT_SECONDS)
    if not coordinator:
        if number is not None or own is not None:
            raise UsageError("--coordinator: is missing; give host:port of process 0, or auto")
        return
    # Two CPU devices of a process can wait for each other's thread, so its stages share one.
    setup.prepare_jax(1)
    # The order of sums in XLA's CPU kernels depends on the process's threads: one per core, or per
    # device if there are more. With as many as a single process with all devices has, results are
    # bitwise equal.
    devices = config.num_stages * config.devices_per_stage
    os.environ.setdefault("NPROC", str(max(machine.cores(), devices)))
    asked = {name: v for name, v in dataclasses.asdict(config).items() if name not in OWN}
    try:
        address = None if coordinator == AUTO else coordinator
        distributed.initialize(address, number, own, seconds)
        distributed.agree(asked, seconds)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def agree_on_run(earlier: Earlier | None) -> None:
    """Checks, before the first file is written, that all processes see the same workdir.

    Args:
      earlier: the run that this process found there.

    Raises:
      UsageError: another process found a different run.
    """
    seen = None if earlier is None else [earlier.finished, earlier.config["cuts"]]
    try:
        distributed.agree({"workdir": seen})
    except ValueError as error:
        raise UsageError(f"--{error} (the run that is there), on one file system") from error


def blame(error: Exception) -> str:
    """An error's message, with the process's number if there are several."""
    own, count = jax.process_index(), jax.process_count()
    return str(error) if count == 1 else f"process {own} of {count}: {error}"


class Wishes:
    """Requests of the first stage's process to all processes: to stop, or to save.

    Processes must do either after the same step. So requests are sent like messages between stages
    and are received by all a fixed number of steps later; nothing waits for them.

    Args:
      pipe: the pipeline.
      every: steps between requests, and from a request to its receipt.
    """

    def __init__(self, pipe: fdg.Pipeline, every: int) -> None:
        self._first = pipe.stages[0]
        self._own = next(stage for stage in pipe.stages if stage.here)
        self._places = [stage.replicated for stage in pipe.stages]
        self._every = every
        self._sent: deque[list[jax.Array]] = deque()

    def heard(self, step: int, stop: bool, late: bool) -> tuple[bool, bool]:
        """The common decision after ``step`` steps; every process calls this after every step.

        Args:
          step: number of steps done.
          stop: whether this process has been asked to stop.
          late: whether a checkpoint is overdue in this process.

        Returns:
          Whether to stop, and whether to save.
        """
        if jax.process_count() == 1:
            return stop, late
        if step % self._every:
            return False, False
        wish = put(np.array([stop, late], np.int32), self._first.replicated)
        self._sent.append([jax.device_put(wish, place) for place in self._places])
        if len(self._sent) < 2:
            return False, False
        copies = self._sent.popleft()
        stopping, saving = jax.device_get(next(c for c in copies if c.sharding.addressable_devices))
        return bool(stopping), bool(saving)
