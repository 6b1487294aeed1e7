"""Simulates many devices: K stages combined with data parallelism.

    python -m experiments.scaling

Trains nothing and uses no device. A mini-batch has --images images per device. Each of the K stages
has D / K devices, which share every mini-batch and sum gradients in a ring after the backward. K =
1 is pure data parallelism. Prints the parallel efficiency in percent as a Markdown table.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags

from experiments.common import command
from experiments.common.errors import UsageError
from experiments.training import methods
from fdg_jax.analysis.costs import Costs
from fdg_jax.analysis.simulate import simulate
from fdg_jax.schedule import create

FLAGS = flags.FLAGS
METHODS = [name for name, method in methods.METHODS.items() if not method.one_stage]
# Bytes per second of a device, one way, and latency of a message in seconds.
NETWORKS = ["NVLink:450e9:3e-6", "InfiniBand:50e9:5e-6", "Ethernet:3.125e9:30e-6"]


def define_flags() -> None:
    flags.DEFINE_list("devices", ["8", "64", "512"], "Numbers of devices D.")
    flags.DEFINE_list("stages", ["1", "2", "4", "8"], "Numbers of stages K; each divides every D.")
    flags.DEFINE_list("methods", ["fdg", "ddg", "one_f_one_b"], f"Any of {', '.join(METHODS)}.")
    flags.DEFINE_list("networks", NETWORKS, "name:bytes per second per device:seconds per message.")
    flags.DEFINE_integer("images", 32, "Images per mini-batch and device.", lower_bound=1)
    flags.DEFINE_float("flops", 24.6e9, "FLOPs per image, forward and backward.")
    flags.DEFINE_float("speed", 100e12, "Sustained FLOP/s per device.")
    flags.DEFINE_float("parameter_bytes", 102.4e6, "Bytes of the network's gradients.")
    flags.DEFINE_float("boundary_bytes", 1.6e6, "Bytes of activations per image between stages.")
    flags.DEFINE_integer("microbatches", 16, "For gpipe and one_f_one_b.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network between devices.

    Attributes:
      name: its kind.
      bandwidth: bytes per second of each device, one way.
      latency: additional seconds of every message.
    """

    name: str
    bandwidth: float
    latency: float

    def message(self, size: float) -> float:
        """Seconds of a message of the given size."""
        return self.latency + size / self.bandwidth

    def all_reduce(self, size: float, devices: int) -> float:
        """Seconds of a ring all-reduce of the given size.

        .. math:: 2 (G - 1) \\left(l + \\frac{s}{G b}\\right)

        Patarasuk and Yuan (2009), "Bandwidth optimal all-reduce algorithms", section 3.
        """
        return 2 * (devices - 1) * self.message(size / devices)


def network(text: str) -> Network:
    """One of --networks.

    Raises:
      UsageError: an unknown network.
    """
    name, *rest = text.split(":")
    try:
        bandwidth, latency = (float(part) for part in rest)
    except ValueError:
        bandwidth, latency = 0.0, 0.0
    if not (0 < bandwidth < float("inf") and 0 <= latency < float("inf")):
        raise UsageError(
            f"--networks={text}: give name:bytes a second:seconds, such as IB:50e9:5e-6"
        )
    return Network(name, bandwidth, latency)


def costs(devices: int, stages: int, its: Network) -> Costs:
    """The costs of one mini-batch in each stage's group of devices."""
    alone = FLAGS.images * FLAGS.flops / FLAGS.speed
    group = devices // stages
    # A device has K times the images of data parallelism, and 1 / K of the network.
    summing = its.all_reduce(FLAGS.parameter_bytes / stages, group)
    return Costs(
        forward=[alone / 3] * stages,
        backward=[2 * alone / 3 + summing] * stages,
        transfer=FLAGS.images * stages * FLAGS.boundary_bytes / its.bandwidth,
        latency=its.latency,
    )


def efficiency(method: str, devices: int, stages: int, its: Network) -> float:
    """Throughput relative to as many independent devices."""
    alone = FLAGS.images * FLAGS.flops / FLAGS.speed
    options: dict[str, Any] = {"microbatches": FLAGS.microbatches}
    name = "backprop" if stages == 1 else methods.METHODS[method].schedule
    run = simulate(create(name, stages, **options), costs(devices, stages, its))
    return run.throughput * alone


def whole(name: str) -> list[int]:
    """The positive integers of a flag."""
    given: list[str] = getattr(FLAGS, name)
    if not given or not all(text.isdecimal() and int(text) for text in given):
        raise UsageError(f"--{name}={','.join(given)}: give whole numbers above 0, such as 8,64")
    return [int(text) for text in given]


def main() -> None:
    devices, stages = whole("devices"), whole("stages")
    networks = [network(text) for text in FLAGS.networks]
    for d in devices:
        for k in stages:
            if d % k:
                raise UsageError(
                    f"--stages={k}: does not divide --devices={d}; choose one that does"
                )
    for name in FLAGS.methods:
        if name not in METHODS:
            raise UsageError(f"--methods={name}: no such method; allowed are {', '.join(METHODS)}")
    for name in ("flops", "speed", "parameter_bytes", "boundary_bytes"):
        if not 0 < getattr(FLAGS, name) < float("inf"):
            raise UsageError(f"--{name}={getattr(FLAGS, name)}: must be above 0")
    heads = ["network", "D", "method", *(f"K={k}" for k in stages)]
    print("| " + " | ".join(heads) + " |")
    print("| --- | ---: | --- |" + " ---: |" * len(stages))
    for its in networks:
        for d in devices:
            for method in FLAGS.methods:
                cells = [f"{100 * efficiency(method, d, k, its):.1f}" for k in stages]
                print(f"| {its.name} | {d} | {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    define_flags()
    command.run(main)
