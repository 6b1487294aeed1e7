"""Contents of a stage during a run: micro-batches, weight versions, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fdg_jax.analysis.costs import Costs
from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.rules import stage_rule
from fdg_jax.schedule import Action, Schedule


class Held(NamedTuple):
    """The contents of a stage after an action.

    Attributes:
      batches: number of mini-batches forwarded whose gradient is not yet applied.
      flights: number of micro-batches forwarded and not yet back-propagated.
      versions: number of weight versions, including the newest.
    """

    batches: int
    flights: int
    versions: int


def held(schedule: Schedule, rule: GradientRule, actions: Iterable[Action]) -> Iterator[Held]:
    """The contents of one stage after each of its actions.

    Args:
      schedule: its kinds determine what an action stores.
      rule: whether a micro-batch in flight keeps the weights of its forward.
      actions: the stage's actions, in order.

    Yields:
      One `Held` per action.
    """
    flights: dict[tuple[int, int | None], int] = {}  # (batch, micro) -> weight version
    met: Counter[int] = Counter()  # weight version -> flights that keep it
    flying: set[int] = set()
    added: set[int] = set()
    updates = 0
    for action in actions:
        kind, part = schedule.kind_of[action.kind], (action.batch, action.micro)
        if kind.in_flight == "opens":
            flights[part] = updates if action.version is None else action.version
            met[flights[part]] += rule.keeps_weights
            flying.add(action.batch)
        elif kind.in_flight == "closes":
            met[flights.pop(part)] -= rule.keeps_weights
            met += Counter()  # drops versions without flights
        elif kind.gradient == "applies":
            updates += 1
            flying -= added
            added.clear()
        if kind.gradient == "adds":
            added.add(action.batch)
        kept = range(max(updates - schedule.versions + 1, 0), updates + 1)
        yield Held(len(flying), len(flights), len(met.keys() | set(kept)))


def bytes_of(now: Held, costs: Costs, k: int, schedule: Schedule, rule: GradientRule) -> float:
    """Size of the contents of a stage; see `Timeline.peak_bytes`."""
    own = stage_rule(rule, schedule, k)
    each = costs.input_bytes[k]
    if own.keeps_residuals:
        each += costs.residual_bytes[k]
    elif own.reconstructs:
        each = costs.kept_bytes[k]
    weights = costs.parameter_bytes[k] * (now.versions + costs.optimizer + own.estimates_weights)
    return weights + now.flights * each / schedule.microbatches
