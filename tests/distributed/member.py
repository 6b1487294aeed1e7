"""One of several processes of a run, for tests: trains a small network and prints the result.

    python -m tests.distributed.member JSON

The JSON has coordinator, num_processes, process_id, and the arguments of `result`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import jax
import numpy as np

import fdg_jax as fdg
from fdg_jax import distributed
from fdg_jax.checkpoint import Checkpointer
from tests import networks

SCHEDULES = {
    "fdg": lambda k: fdg.schedule.fdg(k),
    "gpipe": lambda k: fdg.schedule.gpipe(k, microbatches=2),
}


def pipeline(schedule: str, num_stages: int, tied: bool = False, **options: Any) -> fdg.Pipeline:
    layers, example = networks.network(), networks.batches(1)[0][0]
    if tied:
        layers.insert(-1, networks.dense(networks.WIDTH))
        options["tie"] = fdg.tie(0, 9, "bias", "bias")
    stages = fdg.partition(layers, num_stages, example, cost=[1] * (7 + tied))
    return fdg.Pipeline(
        stages,
        networks.loss_fn,
        networks.sgd(0.5, num_stages),
        SCHEDULES[schedule](num_stages),
        devices=jax.devices(),
        **options,
    )


def result(
    schedule: str,
    num_stages: int,
    *,
    steps: int,
    save: str | None = None,
    restore: str | None = None,
    at: int = 0,
    replace: bool = False,
    **options: Any,
) -> dict[str, Any] | None:
    """Trains and returns hashes of parameters and losses, in the process of the last stage.

    Args:
      schedule: a name in `SCHEDULES`.
      num_stages: K.
      steps: total number of steps.
      save: folder for a checkpoint after ``at`` steps.
      restore: folder of the checkpoint to resume from.
      at: see ``save``.
      replace: whether to start with the weights of another state.
      options: options of the pipeline.
    """
    pipe = pipeline(schedule, num_stages, **options)
    data = networks.batches(steps)
    state = pipe.init(jax.random.key(7), data[0][0])
    if replace:
        other = pipe.init(jax.random.key(9), data[0][0])
        state = pipe.replace_params(state, pipe.true_params(other))
    begin, metrics = 0, []
    if restore is not None:
        with Checkpointer(restore, pipe) as checkpoints:
            state, begin = checkpoints.restore(data[0])
    with jax.transfer_guard("disallow"):
        for step in range(begin, steps):
            state, m = pipe.step(state, data[step])
            metrics += m
            if save is not None and step + 1 == at:
                checkpoints = Checkpointer(save, pipe)
                checkpoints.save(state, at, at)
        state, rest = pipe.drain(state)
    pipe.check()
    if save is not None:
        checkpoints.close()
    left_out = pipe.skipped(state)
    last = pipe.stages[-1]
    params = [distributed.fetch(tree, last.replicated) for tree in pipe.params(state)]
    if not last.here:
        return None
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return {
        "params": digest.hexdigest(),
        "losses": [float(m.loss) for m in metrics + rest],
        "left_out": left_out,
        "total": float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(params))),
    }


def main() -> None:
    settings = json.loads(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", settings.pop("local_devices", 1))
    jax.config.update("jax_enable_x64", True)
    names = ("coordinator", "num_processes", "process_id", "seconds")
    try:
        distributed.initialize(**{n: settings.pop(n) for n in names if n in settings})
        distributed.agree(settings.pop("agree", {"steps": 1}), 60)
        for run in settings["runs"]:
            print("result", json.dumps(result(**run)), flush=True)
    except ValueError as error:
        print(f"error: {error}", flush=True)
        distributed.leave(2)


if __name__ == "__main__":
    main()
