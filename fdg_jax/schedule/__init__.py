"""Schedules as streams of actions: which stage does what in which tick.

A schedule is a rule that maps a tick to actions. ``F3@1``: stage 1 forwards batch 3; ``B1@0``:
stage 0 back-propagates batch 1; ``U@0``: stage 0 applies its accumulated gradient. Everything else
(delay, staleness, batches in flight) is counted from the stream of actions.

FDG with three stages, ticks downwards; no stage waits for another inside a tick:

    tick | stage 0   stage 1   stage 2
       0 | F0
       1 | F1        F0
       2 | F2        F1        F0 B0 U
       3 | F3        F2 B0 U   F1 B1 U
       4 | F4 B0 U   F3 B1 U   F2 B2 U
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fdg_jax.schedule.action import Action, Kind, Port
from fdg_jax.schedule.delayed import Order, adl, ddg, fdg, local, pipedream, pipedream_2bw
from fdg_jax.schedule.grid import LEGEND, parse
from fdg_jax.schedule.predicted import dni, dni_late
from fdg_jax.schedule.schedule import Schedule
from fdg_jax.schedule.sequence import then
from fdg_jax.schedule.synchronous import backprop, gpipe, one_f_one_b, zero_bubble

NAMED: dict[str, Callable[..., Schedule]] = {
    f.__name__: f
    for f in (
        backprop,
        fdg,
        ddg,
        pipedream,
        pipedream_2bw,
        gpipe,
        one_f_one_b,
        zero_bubble,
        adl,
        local,
        dni,
        dni_late,
    )
}


def create(name: str, num_stages: int, **options: Any) -> Schedule:
    """Creates a schedule by name.

    Args:
      name: one of `NAMED`.
      num_stages: K.
      **options: such as ``microbatches``, ``accumulate``, ``reduction``, ``order``. None is the
        schedule's default. Options of other schedules are ignored, so that one set of settings
        works for all.

    Returns:
      The schedule.

    Raises:
      ValueError: unknown schedule, an option of no schedule, or an option out of bounds.

    Example:
      >>> create("adl", 2, accumulate=4, microbatches=8).staleness(0)
      1
    """
    if name not in NAMED:
        raise ValueError(f"name={name!r}: no such schedule; allowed are {', '.join(NAMED)}")
    every = {n for make in NAMED.values() for n in inspect.signature(make).parameters}
    every.discard("num_stages")
    for option, value in options.items():
        if option not in every:
            raise ValueError(
                f"{option}={value!r}: no schedule has this option; allowed are "
                f"{', '.join(sorted(every))}"
            )
    known = inspect.signature(NAMED[name]).parameters
    given = {k: v for k, v in options.items() if k in known and v is not None}
    return NAMED[name](num_stages, **given)


__all__ = [
    "LEGEND",
    "NAMED",
    "Action",
    "Kind",
    "Order",
    "Port",
    "Schedule",
    "adl",
    "backprop",
    "create",
    "ddg",
    "dni",
    "dni_late",
    "fdg",
    "gpipe",
    "local",
    "one_f_one_b",
    "parse",
    "pipedream",
    "pipedream_2bw",
    "then",
    "zero_bubble",
]
