"""A timed case: one network, one dtype, one training loop, in its own process."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from experiments.accelerating.network import NETWORKS, TINY, parameters, workload
from experiments.accelerating.piece import MARK, Piece

STAGES = (2, 4, 8)
DTYPES = ("float32", "bfloat16")
# Maximum number of steps of a turn.
MOST_STEPS = 1000


@dataclass(frozen=True)
class Case:
    """A timed case; contenders as in experiments.benchmark.

    Attributes:
      network: a name in NETWORKS, or with ``tiny`` in TINY.
      dtype: dtype of activations.
      contender: backprop, engine_k1, one_device_k<K> or one_device_k<K>_dispatched.
      rounds: number of rounds, of which the median is taken.
      turn_seconds: seconds of a round.
      tiny: whether it is a rehearsal.
    """

    network: str
    dtype: str
    contender: str
    rounds: int = 7
    turn_seconds: float = 1.0
    tiny: bool = False

    @property
    def name(self) -> str:
        return f"times/{self.network}/{self.dtype}/{self.contender}"


def contenders(stages: tuple[int, ...]) -> list[str]:
    """Back-propagation, the engine at K = 1, and FDG compiled and dispatched."""
    piped = [f"one_device_k{k}{how}" for k in stages for how in ("", "_dispatched")]
    return ["backprop", "engine_k1", *piped]


def cases(networks: list[str], rehearse: bool) -> list[Case]:
    """All cases: first float32 of every network, then bfloat16."""
    if not rehearse:
        return [
            Case(network, dtype, contender)
            for dtype in DTYPES
            for network in networks
            for contender in contenders(STAGES)
        ]
    chosen = [("float32", name) for name in contenders((2,))]
    chosen += [("bfloat16", name) for name in ("backprop", "one_device_k2")]
    return [
        Case(network, dtype, name, rounds=3, turn_seconds=0.02, tiny=True)
        for network in networks
        for dtype, name in chosen
    ]


def pieces(networks: list[str], rehearse: bool) -> list[Piece]:
    """A process for every case."""
    known = TINY if rehearse else NETWORKS
    return [
        Piece(
            "times",
            case.name,
            (sys.executable, "-m", "experiments.accelerating.case", json.dumps(asdict(case))),
            known[case.network].expected,
            group=f"times/{case.network}",
        )
        for case in cases(networks, rehearse)
    ]


def measure(case: Case) -> dict[str, Any]:
    """Seconds of a step and the device's peak memory in this process; call once per process."""
    import jax

    from experiments.benchmarking import contender
    from experiments.training import setup

    setup.prepare_jax(1)
    network = (TINY if case.tiny else NETWORKS)[case.network]
    work = workload(network, case.dtype)
    began = time.perf_counter()
    one = contender.make(case.contender, work)
    one.turn(one.fill + 1)  # compiles and fills
    ready = time.perf_counter() - began
    few = one.turn(2) / 2
    steps = min(max(math.ceil(case.turn_seconds / few), 2), MOST_STEPS)
    seconds = [one.turn(steps) / steps for _ in range(case.rounds)]
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    loss = one.loss
    return {
        "network": case.network,
        "about": network.about,
        "parameters": parameters(work),
        "dtype": case.dtype,
        "contender": case.contender,
        "stages": one.stages,
        "compiled": isinstance(one, contender.Piped) and one.pipe.compiled,
        "seconds": {
            "median": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "rounds": seconds,
            "steps": steps,
        },
        "ready_seconds": ready,
        "peak_bytes": peak,
        "loss": loss if math.isfinite(loss) else None,
    }


if __name__ == "__main__":
    print(MARK + json.dumps(measure(Case(**json.loads(sys.argv[1])))))
