"""Plain back-propagation in its own process: pinned to one core, or with JAX's defaults.

Run by `experiments.benchmark`: it reads the settings from its arguments, reports when it is ready,
and then trains the number of steps in each line of its input.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

from experiments.benchmarking.other_process import LeftOut, OtherProcess
from experiments.benchmarking.workload import Settings


class Child(OtherProcess):
    """A contender trained by this module's `main`.

    Args:
      name: as in --contenders.
      settings: settings of the benchmark.

    Raises:
      RuntimeError: it ended before it was ready.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        words = json.dumps(dataclasses.asdict(settings))
        super().__init__(
            name, [sys.executable, "-m", "experiments.benchmarking.child", name, words]
        )


class OneCore(Child):
    """`backprop` in a process pinned to one core.

    An XLA CPU device uses threads on all cores available to its process and runs independent parts
    of a program in parallel. So a step "on one device" uses several cores, which the stages of a
    pipeline must share.

    Raises:
      LeftOut: this system cannot pin a process to a core.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        if not hasattr(os, "sched_setaffinity"):
            raise LeftOut("this system does not hold a process to a core")
        super().__init__(name, settings)
        self.about = f"one jitted step, in a process that may use core {self.ready['core']} alone"


class Untuned(Child):
    """`backprop_xla` without retained memory: plain JAX apart from the model."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings)
        self.about = "one jitted step, JAX's derivatives, memory not kept, in its own process"


def main() -> None:
    name, values = sys.argv[1], json.loads(sys.argv[2])
    one_core = name == "backprop_one_core"
    core = None
    if one_core:
        core = max(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {core})  # before JAX counts the cores and creates its threads
    import jax

    from experiments.benchmarking import contender
    from experiments.benchmarking.workload import Workload
    from experiments.training import setup

    settings = Settings(**{**values, "contenders": tuple(values["contenders"]), "num_stages": 1})
    # XLA compiles different programs for one core, which its cache does not distinguish.
    if one_core:
        jax.config.update("jax_enable_compilation_cache", False)
    setup.prepare_jax(1, keep_memory=one_core)
    made = contender.make("backprop" if one_core else "backprop_xla", Workload(settings))
    made.turn(1)
    print(json.dumps({"core": core}), flush=True)
    for line in sys.stdin:
        seconds = made.turn(int(line))
        print(json.dumps({"seconds": seconds, "loss": made.loss}), flush=True)


if __name__ == "__main__":
    main()
