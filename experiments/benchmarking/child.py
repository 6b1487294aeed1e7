"""Contenders in their own processes: each pinned to a core, or with JAX's defaults.

Run by `experiments.benchmark`: it reads the settings from its arguments, reports when it is ready,
and then trains the number of steps in each line of its input.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

from experiments.benchmarking.other_process import LeftOut, OtherProcess
from experiments.benchmarking.workload import Settings, Workload
from fdg_jax import distributed


class Child(OtherProcess):
    """A contender trained by this module's `main`.

    Args:
      name: as in --contenders.
      settings: of the benchmark.
      processes: how many; each trains a stage.

    Raises:
      RuntimeError: one ended before it was ready.
    """

    def __init__(self, name: str, settings: Settings, processes: int = 1) -> None:
        words = json.dumps(dataclasses.asdict(settings))
        port = distributed.free_port()
        program = [sys.executable, "-m", "experiments.benchmarking.child", name, words, str(port)]
        super().__init__(name, *([*program, str(i)] for i in range(processes)))


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
        core = self.ready[0]["core"]
        self.about = f"one jitted step, in a process that may use core {core} alone"


class OneCoreEach(Child):
    """`fdg` with a stage in each process, and a core for each process.

    Args:
      name: as in --contenders.
      work: of the benchmark.

    Raises:
      LeftOut: there are fewer cores, or this system does not hold a process to a core.
    """

    def __init__(self, name: str, work: Workload) -> None:
        settings, count = work.settings, work.settings.num_stages
        if not hasattr(os, "sched_setaffinity"):
            raise LeftOut("this system does not hold a process to a core")
        if len(os.sched_getaffinity(0)) < count:
            raise LeftOut(f"{count} processes need a core each; there are fewer")
        # Measured once: processes that measure for themselves may cut differently.
        cuts = ",".join(map(str, work.split(count).cuts)) if count > 1 else "flops"
        super().__init__(name, dataclasses.replace(settings, partition=cuts), count)
        self.stages = count
        self.about = f"fdg, {count} stages, a process and a core for each"


class Untuned(Child):
    """`backprop_xla` without retained memory: plain JAX apart from the model."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings)
        self.about = "one jitted step, JAX's derivatives, memory not kept, in its own process"


def main() -> None:
    name, values, port, i = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    one_core = name != "backprop_untuned"
    core = None
    if one_core:
        core = sorted(os.sched_getaffinity(0))[-1 - i]
        os.sched_setaffinity(0, {core})  # before JAX counts the cores, and makes its threads
    import jax

    from experiments.benchmarking import contender
    from experiments.benchmarking.workload import Workload
    from experiments.data import cache
    from experiments.training import setup

    settings = Settings(**{**values, "contenders": tuple(values["contenders"])})
    if one_core:
        # XLA makes other programs where there is one core; its cache would not tell them apart.
        own = cache.directory() / "compiled_for_one_core"
        jax.config.update("jax_compilation_cache_dir", str(own))
    setup.prepare_jax(1, keep_memory=one_core)
    if name == "fdg_two_processes":
        distributed.initialize(f"127.0.0.1:{port}", settings.num_stages, i)
        made = contender.make("fdg", Workload(settings))
    else:
        settings = dataclasses.replace(settings, num_stages=1)
        made = contender.make("backprop" if one_core else "backprop_xla", Workload(settings))
    made.turn(made.fill)
    print(json.dumps({"core": core}), flush=True)
    for line in sys.stdin:
        seconds = made.turn(int(line))
        has = not isinstance(made, contender.Piped) or made.pipe.stages[-1].here
        loss = made.loss if has else None
        print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)
    if name == "fdg_two_processes":
        distributed.leave(0)


if __name__ == "__main__":
    main()
