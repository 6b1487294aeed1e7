"""Plain backpropagation held to one core: a device that shares with no other.

Run by `experiments.benchmark`: it reads the settings from its arguments, says when it is ready, and
then trains as many steps as each line of its input says.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

from experiments.other_process import LeftOut, OtherProcess
from experiments.workload import Settings


class OneCore(OtherProcess):
    """`backprop` in a process that may use one core only.

    XLA gives a CPU device the threads of all cores that its process may use, and runs what is
    independent inside a program side by side. So a step "on one device" takes more than one core,
    where a stage of a pipeline must share them with the other stages.

    Args:
      name: as in --contenders.
      settings: of the benchmark.

    Raises:
      LeftOut: this system does not hold a process to a core.
      RuntimeError: it ended before it was ready.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        if not hasattr(os, "sched_setaffinity"):
            raise LeftOut("this system does not hold a process to a core")
        words = json.dumps(dataclasses.asdict(settings))
        super().__init__(name, [sys.executable, "-m", "experiments.one_core", words])
        self.about = f"one jitted step, in a process that may use core {self.ready['core']} alone"


def main() -> None:
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # before JAX counts the cores, and makes its threads
    import jax

    from experiments import contender, setup
    from experiments.workload import Workload

    values = json.loads(sys.argv[1])
    settings = Settings(**{**values, "contenders": tuple(values["contenders"]), "num_stages": 1})
    # XLA makes other programs where there is one core; its cache would not tell them apart.
    jax.config.update("jax_enable_compilation_cache", False)
    setup.prepare_jax(1)
    made = contender.make("backprop", Workload(settings))
    made.turn(1)
    print(json.dumps({"core": core}), flush=True)
    for line in sys.stdin:
        seconds = made.turn(int(line))
        print(json.dumps({"seconds": seconds, "loss": made.loss}), flush=True)


if __name__ == "__main__":
    main()
