"""Throughput of every method, simulated from measured times of stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fdg_jax import methods
from fdg_jax.analysis.costs import Costs
from fdg_jax.analysis.layer_times import LayerTimes, Setting
from fdg_jax.analysis.simulate import simulate
from fdg_jax.analysis.stage_bytes import StageBytes
from fdg_jax.schedule import Schedule

# Methods predicted for K > 1; those without staleness first.
METHODS = ("backprop", "data_parallel", "one_f_one_b", "ddg", "fdg")


@dataclass(frozen=True)
class Measured:
    """The measurements that predictions are based on.

    Args:
      layers: seconds of every layer by setting, from which the cuts follow: ``Setting()``, and K
        pipelines at once if devices share cores.
      stages: seconds of every stage by K and setting; the whole network is the stage of K = 1.
        ``Setting()`` is required for each K; others are K pipelines at once, if devices share
        cores, and those required by methods.
      cuts: K-1 layer numbers for every K > 1.
      hops: seconds of a message of a whole mini-batch over each of the K-1 hops, for every K > 1.
      latency: seconds of the smallest message, included in those of all others.
      sizes: sizes of the stages, for every K including 1.
      shared: sizes of the whole network with 1/n of a mini-batch, for every number n of devices in
        data parallelism.
      parts: micro-batches of a mini-batch in one_f_one_b.
    """

    layers: Mapping[Setting, LayerTimes]
    stages: Mapping[int, Mapping[Setting, LayerTimes]]
    cuts: Mapping[int, tuple[int, ...]]
    hops: Mapping[int, tuple[float, ...]]
    latency: float
    sizes: Mapping[int, StageBytes]
    shared: Mapping[int, StageBytes]
    parts: int = 4

    def beside(self, stages: int, parts: int = 1) -> LayerTimes | None:
        """Times of the stages while all of them run; None if not measured."""
        own = self.stages.get(stages, {})
        return own.get(Setting(pipelines=stages, parts=parts)) or own.get(Setting(parts=parts))


@dataclass(frozen=True)
class Row:
    """The prediction for one method.

    Attributes:
      method: its name in `fdg_jax.methods`.
      devices: number of devices; equals the number of stages except for data_parallel.
      throughput: mini-batches per second.
      speedup: over back-propagation on one device.
      bytes: peak memory of each device: weights and their versions, optimizer state, inputs and
        residuals in flight; without temporary values of programs.
      staleness: updates between a forward and the application of its gradient, by stage.
      cuts: K-1 layer numbers, for ``fdg_jax.partition(..., cost=cuts)``.
    """

    method: str
    devices: int
    throughput: float
    speedup: float
    bytes: tuple[float, ...]
    staleness: tuple[int, ...]
    cuts: tuple[int, ...]


def predict(measured: Measured) -> tuple[Row, ...]:
    """Predicts every method on 1 to D devices for which measurements exist.

    Back-propagation with K > 1 runs the same stages one after the other.

    Args:
      measured: times and sizes.

    Returns:
      Rows, back-propagation on one device first.
    """
    base = _row(measured, "backprop", 1, None)
    assert base is not None
    rows = [base]
    for count in range(2, max((1, *measured.cuts, *measured.shared)) + 1):
        found = (_row(measured, name, count, base) for name in METHODS)
        rows += [row for row in found if row is not None]
    return tuple(rows)


def costs_of(measured: Measured, method: str, stages: int) -> Costs | None:
    """Seconds and bytes of the stages of a method.

    The engine compiles a backward and its update as one program, and all three in the last stage.
    With M micro-batches the seconds are M times those of one, and the update counts once.

    Args:
      measured: times and sizes.
      method: one of those with a device for every stage.
      stages: K.

    Returns:
      The costs, or None if measurements are missing.
    """
    parts = measured.parts if method == "one_f_one_b" else 1
    # In back-propagation only one stage runs at a time.
    alone = method == "backprop"
    own = measured.stages.get(stages, {})
    times = own.get(Setting()) if alone else measured.beside(stages, parts)
    if times is None or stages not in measured.sizes:
        return None
    forward, backward, together, update = map(list, times)
    if parts > 1:
        # Accumulating backwards include no update, and no stage compiles all as one program.
        pure = [max(b - u, 0.0) for b, u in zip(backward, update, strict=True)]
        forward = [parts * seconds for seconds in forward]
        backward = [parts * seconds for seconds in pure]
    else:
        forward[-1] = min(forward[-1], together[-1])
        backward[-1] = together[-1] - forward[-1]
        update = [0.0] * stages
    sizes = measured.sizes[stages]
    return Costs(
        forward,
        backward,
        update,
        transfer=[max(hop - measured.latency, 0.0) for hop in measured.hops.get(stages, ())],
        latency=measured.latency if stages > 1 else 0.0,
        input_bytes=sizes.inputs,
        residual_bytes=sizes.residuals,
        parameter_bytes=sizes.parameters,
    )


def crossing(costs: Costs, gain: float = 0.05) -> float | None:
    """The length of messages from which FDG is faster than DDG, by simulation.

    For K equal stages of T seconds and messages of m seconds

    .. math::
        t_{\\text{DDG}} = T + 2 \\frac{K-1}{K} m, \\qquad
        t_{\\text{FDG}} = T \\quad \\text{while } m \\le T/2

    Args:
      costs: costs of the stages; transfer and latency are ignored.
      gain: required speedup of FDG over DDG, minus 1.

    Returns:
      Seconds of a message relative to the slowest stage, to four digits; None if FDG does not gain
      as much at any length.

    Example:
      >>> [crossing(Costs([1] * k, [2] * k)) for k in (2, 4, 8)]
      [0.05, 0.0333, 0.0286]
      >>> crossing(Costs([1, 1], [2, 3]))  # the first stage waits in any case
      0.175
    """
    stages = len(costs.forward)
    times = list(zip(costs.forward, costs.backward, costs.update, strict=True))
    slowest = max(map(sum, times))

    def faster(share: float) -> float:
        its = Costs(costs.forward, costs.backward, costs.update, transfer=share * slowest)
        one, other = (
            simulate(methods.create(name, stages)["schedule"], its).throughput
            for name in ("fdg", "ddg")
        )
        return one / other - 1

    low, high = 0.0, 1.0
    if faster(high) < gain:
        return None
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if faster(middle) >= gain else (middle, high)
    return round(high, 4)


def _row(measured: Measured, name: str, count: int, base: Row | None) -> Row | None:
    if name == "data_parallel":
        times = measured.stages[1].get(Setting(shared_by=count))
        if times is None:
            return None
        sizes = measured.shared[count]
        costs: Costs | None = Costs(
            [0],
            list(times.together),
            input_bytes=sizes.inputs,
            residual_bytes=sizes.residuals,
            parameter_bytes=sizes.parameters,
        )
    else:
        costs = costs_of(measured, name, count)
        sizes = measured.sizes[count] if costs else StageBytes((), (), (), (), ())
    if costs is None:
        return None
    schedule = _schedule(measured, name, count)
    run = simulate(schedule, costs)
    stages = range(schedule.num_stages)
    return Row(
        name,
        count,
        run.throughput,
        run.throughput / base.throughput if base else 1.0,
        tuple(run.peak_bytes(k) + sizes.optimizer[k] for k in stages),
        tuple(schedule.staleness(k) for k in stages),
        () if name == "data_parallel" else tuple(measured.cuts.get(count, ())),
    )


def _schedule(measured: Measured, name: str, count: int) -> Schedule:
    options = {"microbatches": measured.parts} if name == "one_f_one_b" else {}
    return methods.create(name, count, **options)["schedule"]
