"""Simulates a schedule with given costs of its actions; needs no devices.

FDG with two stages, forward 1 s, backward 2 s:

    seconds | 0   1   2   3   4   5   6   7   8   9   10
    stage 0 | F0  F1  F2      B0----  F3  B1----  F4  B2-
    stage 1 |     F0  B0----  F1  B1----  F2  B2----  F3
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from fdg_jax.analysis.costs import Costs
from fdg_jax.analysis.timeline import Event, Timeline
from fdg_jax.engine.gradient_rule import STALE, GradientRule
from fdg_jax.engine.rules import gradient_rule
from fdg_jax.schedule import Action, Schedule, backprop


def simulate(
    schedule: Schedule,
    costs: Costs,
    batches: int | None = None,
    gradient: str | GradientRule = "stale",
    shared: Sequence[int] | None = None,
) -> Timeline:
    """Start and end of every action of a run.

    Every device runs its actions in the order of the schedule's stream. An action a of stage k
    starts when its device d is free and its inputs have arrived:

    .. math::
        \\mathrm{start}(a) = \\max\\left(\\mathrm{free}(d),
        \\max_{n \\in \\mathrm{needs}(a)} \\mathrm{end}(n) + \\mathrm{transfer}(n, a)\\right)

    The engine compiles a backward and its update as one program, so the message is sent after both;
    here it is sent after the backward. Include `Costs.update` in `Costs.backward` if that matters.

    Args:
      schedule: the schedule.
      costs: the costs of its stages.
      batches: number of mini-batches; None: enough for a steady state.
      gradient: the gradient rule; "recompute_stale" and "recompute" run forwards twice.
      shared: the device number of each stage; None: one device per stage. Messages between stages
        of one device take no time.

    Returns:
      The timeline.

    Raises:
      ValueError: inconsistent arguments; the message names the remedy.

    Example:
      >>> import fdg_jax as fdg
      >>> costs = Costs(forward=[1, 1], backward=[2, 2])
      >>> run = simulate(fdg.schedule.fdg(2), costs, batches=12)
      >>> [f"{e.action} {e.start:g}-{e.end:g}" for e in run.events[:5]]
      ['F0@0 0-1', 'F0@1 1-2', 'B0@1 2-4', 'U@1 4-4', 'F1@0 1-2']
      >>> run.speedup, run.in_flight(0), run.utilisation(1)
      (2.0, 3, 1.0)
    """
    stages = schedule.num_stages
    if len(costs.forward) != stages:
        raise ValueError(
            f"costs: of {len(costs.forward)} stages, but schedule {schedule.name} is made for "
            f"{stages}; give one number per stage"
        )
    if batches is not None and batches < 1:
        raise ValueError(f"batches={batches}: must be 1 or more")
    rule = gradient_rule(gradient)
    devices = list(range(stages)) if shared is None else list(shared)
    if len(devices) != stages:
        raise ValueError(f"shared: {len(devices)} devices for {stages} stages; give one per stage")
    # Three batches of backprop, each entering when the previous one ends.
    plain = backprop(stages)
    baseline = Timeline(plain, costs, STALE, _walk(plain, costs, 3, STALE, devices), 1.0)
    events = _walk(schedule, costs, batches or enough(schedule), rule, devices)
    return Timeline(schedule, costs, rule, events, baseline.throughput)


def enough(schedule: Schedule) -> int:
    """Number of batches with a steady state: fill and drain, and as many again.

    Args:
      schedule: the schedule.

    Returns:
      The number of batches.

    Example:
      >>> from fdg_jax.schedule import fdg
      >>> enough(fdg(2)), enough(fdg(64))
      (20, 516)
    """
    return schedule.start + 4 * (schedule.fill + 1) + 8 * schedule.period


def _walk(
    schedule: Schedule,
    costs: Costs,
    batches: int,
    rule: GradientRule,
    devices: Sequence[int],
) -> list[Event]:
    """The events in the order of the stream."""
    assert isinstance(costs.transfer, tuple)
    hops = [seconds / schedule.microbatches + costs.latency for seconds in costs.transfer]
    seconds_of = functools.cache(lambda kind, k: costs.seconds(Action(kind, 0, k), schedule, rule))
    free: dict[int, float] = dict.fromkeys(devices, 0)
    done: dict[tuple[str, int, int | None, int], float] = {}
    events = []
    for action in itertools.chain.from_iterable(schedule.stream(batches)):
        kind, batch, k, micro, _ = action
        device = devices[k]
        start = free[device]
        for source, stage in itertools.chain.from_iterable(schedule.sources[kind][k]):
            end = done.get((source, batch, micro, stage))
            if end is None:
                continue  # an alternative that does not occur
            hop = 0 if devices[stage] == device else hops[min(k, stage)]
            # No addition without a transfer, so that fractions stay exact.
            start = max(start, end + hop if hop else end)
        free[device] = end = start + seconds_of(kind, k)
        done[kind, batch, micro, k] = end
        events.append(Event(action, start, end, device))
    return events
