"""The devices of a run's stages, and cuts shared by its processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from experiments.common.errors import UsageError
from experiments.training.config import Config
from fdg_jax import distributed


def places(config: Config, num_stages: int, microbatches: int) -> list[jax.Device]:
    """The devices of the run, in order of the stages.

    A method that does not cut the network has all of them in one stage. With one device per stage,
    neighbouring stages share devices if there are too few.

    Raises:
      UsageError: too few devices, a batch that is not divisible, or a process without a stage.
    """
    wanted, there = config.num_stages * config.devices_per_stage, jax.devices()
    if config.devices_per_stage > 1 and wanted > len(there):
        raise UsageError(
            f"--devices_per_stage={config.devices_per_stage}: {config.num_stages} stages need "
            f"{wanted} devices, there are {len(there)}; choose fewer"
        )
    devices = there[:wanted]
    group = len(devices) // num_stages or 1
    if config.batch_size // microbatches % group:
        whole = microbatches * group
        raise UsageError(
            f"--batch_size={config.batch_size}: does not divide over the {group} devices of a "
            f"stage with --method={config.method}; choose a multiple of {whole}"
        )
    used, processes = {d.process_index for d in devices}, jax.process_count()
    if len(used) < processes:
        raise UsageError(
            f"--num_processes={processes}: {config.num_stages} stages of "
            f"{config.devices_per_stage} devices are all in {len(used)} of them; start as many"
        )
    return devices


def shared_cuts(
    cuts: list[int] | None, num_stages: int, writer: int, find: Callable[[], Sequence[int]]
) -> list[int] | None:
    """The cuts used by all processes; determined by the writer's measurements if not given.

    Args:
      cuts: the cuts of a resumed run, if any.
      num_stages: K.
      writer: the process that determines them, and writes their costs to config.json.
      find: determines them; only called in the writer.

    Returns:
      The cuts; None in the writer, which keeps its own, and in a run of one process.
    """
    if jax.process_count() == 1 or cuts is not None or num_stages == 1:
        return cuts
    own = jax.process_index() == writer
    found = np.array(find() if own else [0] * (num_stages - 1), np.int32)
    found = distributed.gather(found)[writer]
    return None if own else [int(cut) for cut in found]
