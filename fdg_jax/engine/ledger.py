"""What a pipeline holds after so many mini-batches: it follows from the schedule alone.

A checkpoint that says otherwise was not made by this pipeline, however well its hashes fit. The
bookkeeping is that of `tick.Tick`, with names in the place of arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fdg_jax.schedule import Schedule


@dataclasses.dataclass
class Holding:
    """What one stage holds, counted from the last drain.

    Attributes:
      version: updates made.
      held: gradients accumulated and not yet applied.
      flights: micro-batches in flight, in the order of their forwards, with the version they met.
      activations, cotangents, labels: messages not yet consumed, by micro-batch.
      metrics: parts of unfinished mini-batches.
    """

    version: int = 0
    held: int = 0
    flights: dict[int, int] = dataclasses.field(default_factory=dict)
    activations: set[int] = dataclasses.field(default_factory=set)
    cotangents: set[int] = dataclasses.field(default_factory=set)
    labels: set[int] = dataclasses.field(default_factory=set)
    metrics: dict[int, int] = dataclasses.field(default_factory=dict)


def inventory(schedule: Schedule, batches: int) -> list[Holding]:
    """What each stage holds when ``batches`` mini-batches have entered since the last drain.

    Args:
      schedule: of the pipeline.
      batches: how many, >= 0; any number costs the same, since a schedule repeats itself.

    Returns:
      One `Holding` per stage, in no order but that of the flights.

    Example:
      >>> from fdg_jax import schedule
      >>> first, last = inventory(schedule.fdg(2), 5)
      >>> first.flights, sorted(first.cotangents), sorted(last.activations), last.version
      ({3: 1, 4: 2}, [3], [4], 4)
    """
    stages = [Holding() for _ in range(schedule.num_stages)]
    period, count, last = schedule.period, schedule.microbatches, schedule.num_stages - 1
    # Nothing that was there at the end of the fill is left so many ticks later.
    longest = schedule.num_stages * (schedule.in_flight(0) + period)
    whole = max(0, (batches - 2 * longest) // period)  # periods that need not be gone through
    ticks = batches - whole * period
    updates = [0] * schedule.num_stages
    for t in range(ticks):
        if t == ticks - period:
            updates = [stage.version for stage in stages]
        parts = range(t * count, (t + 1) * count)
        stages[0].activations.update(parts)
        stages[last].labels.update(parts)
        for action in schedule.tick(t):
            k, n = action.stage, action.batch * count + (action.micro or 0)
            own = stages[k]
            if action.kind == "F":
                own.activations.remove(n)
                own.labels.discard(n)
                own.flights[n] = own.version if action.version is None else action.version
                if k < last:
                    stages[k + 1].activations.add(n)
                    continue
                own.cotangents.add(n)
                own.metrics[action.batch] = own.metrics.get(action.batch, 0) + 1
                if own.metrics[action.batch] == count:
                    del own.metrics[action.batch]
            elif action.kind == "B":
                del own.flights[n]
                own.cotangents.remove(n)
                own.held += 1
                if k > 0:
                    stages[k - 1].cotangents.add(n)
            else:
                own.version, own.held = own.version + 1, 0
    return [
        _later(stage, whole * period, count, whole * (stage.version - before))
        for stage, before in zip(stages, updates, strict=True)
    ]


def _later(stage: Holding, batches: int, count: int, updates: int) -> Holding:
    """The same, so many mini-batches and updates later."""
    parts = batches * count
    return Holding(
        stage.version + updates,
        stage.held,
        {n + parts: version + updates for n, version in stage.flights.items()},
        {n + parts for n in stage.activations},
        {n + parts for n in stage.cotangents},
        {n + parts for n in stage.labels},
        {batch + batches: there for batch, there in stage.metrics.items()},
    )


def numbers(
    stage: Holding, schedule: Schedule, origin: int, base: int, today: bool
) -> tuple[dict[str, Any], set[str]]:
    """What `causes.numbers` and the names of `causes.sections` are for a stage.

    Args:
      stage: what it holds.
      schedule: of the pipeline.
      origin: the number of the first mini-batch after the last drain.
      base: updates made before it.
      today: whether batches in flight keep no weights.

    Returns:
      The counts and the names.
    """
    parts, version = origin * schedule.microbatches, base + stage.version
    flights = [[n + parts, met + base] for n, met in stage.flights.items()]
    older = list(range(max(base, version - schedule.versions + 1), version))
    kept = set(older) if today else {*older, *(met for _, met in flights)}
    names = {"params", "model_state", "opt_state", "number"}
    names |= {"gradient"} if stage.held else set()
    names |= {f"version.{v}" for v in kept - {version}}
    names |= {f"flight.{n}" for n, _ in flights}
    names |= {f"activation.{n + parts}" for n in stage.activations}
    names |= {f"cotangent.{n + parts}" for n in stage.cotangents}
    names |= {f"label.{n + parts}" for n in stage.labels}
    for batch, there in stage.metrics.items():
        names |= {f"metrics.{batch + origin}.{i}" for i in range(there)}
    counts = {"held": stage.held, "version": version, "base": base, "older": older}
    return {**counts, "flights": flights}, names
