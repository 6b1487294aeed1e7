"""One run in several processes: which this is, and what they decide together."""

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
# What processes on different machines may have differently.
OWN = ("data_dir",)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Who this process is; without --coordinator there is but one."""
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
    """Finds the other processes of the run, if there are any, and compares notes with them.

    Args:
      config: what this process has been asked for.
      values: see `define_flags`.

    Raises:
      UsageError: they cannot be found, or have been asked for something else.
    """
    coordinator, number, own = (
        values[name].value for name in ("coordinator", "num_processes", "process_id")
    )
    seconds = float(values["connect_seconds"].value or distributed.CONNECT_SECONDS)
    if not coordinator:
        if number is not None or own is not None:
            raise UsageError("--coordinator: is missing; give host:port of process 0, or auto")
        return
    # Two CPU devices of a process can wait for each other's thread; more stages share the one.
    setup.prepare_jax(1)
    # XLA's kernels on CPU add in an order that depends on the threads of their process: one a core,
    # or a device where there are more. So many as in one process with all devices, the same bits.
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
    """Before the first file is written: all processes see the same in the workdir.

    Args:
      earlier: the run that this process found there.

    Raises:
      UsageError: another process found another.
    """
    seen = None if earlier is None else [earlier.finished, earlier.config["cuts"]]
    try:
        distributed.agree({"workdir": seen})
    except ValueError as error:
        raise UsageError(f"--{error} (the run that is there), on one file system") from error


def blame(error: Exception) -> str:
    """An error's message, with the process where there are several."""
    own, count = jax.process_index(), jax.process_count()
    return str(error) if count == 1 else f"process {own} of {count}: {error}"


class Wishes:
    """What the first stage's process wants of all: to stop, or to save.

    Processes must do either after the same step. So the wish travels, as messages between stages
    do, and is heard some steps later by all at once; nothing waits for it.

    Args:
      pipe: the pipeline.
      every: steps between wishes, and from a wish to its hearing.
    """

    def __init__(self, pipe: fdg.Pipeline, every: int) -> None:
        self._first = pipe.stages[0]
        self._own = next(stage for stage in pipe.stages if stage.here)
        self._places = [stage.replicated for stage in pipe.stages]
        self._every = every
        self._sent: deque[list[jax.Array]] = deque()

    def heard(self, step: int, stop: bool, late: bool) -> tuple[bool, bool]:
        """What all processes do after ``step`` steps; each calls this after every step.

        Args:
          step: steps done.
          stop: whether this process has been asked to stop.
          late: whether in this process a checkpoint is overdue.

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
