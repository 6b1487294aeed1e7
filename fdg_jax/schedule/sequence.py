"""Sequences of two schedules in one run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from fdg_jax.schedule.action import Action
from fdg_jax.schedule.counts import Counts, count
from fdg_jax.schedule.ledger import Holding, Ledger, shift
from fdg_jax.schedule.schedule import Schedule


@dataclass(frozen=True)
class Phases:
    """Tick t of `then`: the first schedule until ``steps``, its drain, then the second."""

    first: Schedule
    steps: int
    second: Schedule

    def __call__(self, t: int) -> Sequence[Action]:
        steps = self.steps
        if t < steps:
            return self.first.tick(t, steps)
        late = [a._replace(batch=a.batch + steps) for a in self.second.tick(t - steps)]
        return [*self.drain, *late] if t == steps else late

    @functools.cached_property
    def drain(self) -> list[Action]:
        """The remaining actions of the first schedule after its last mini-batch."""
        left: list[Action] = []
        longest = 2 * (self.first.fill + self.first.period) + 2
        for t in range(self.steps, self.steps + longest):
            left += self.first.tick(t, self.steps)
        adding = {kind.name for kind in self.first.kinds if kind.gradient == "adds"}
        pending = [own.pending for own in self.first.holdings(self.steps)]
        waiting: dict[int, int] = {k: self.steps - 1 for k, n in enumerate(pending) if n}
        for action in left:
            if action.kind in adding:
                waiting[action.stage] = action.batch
            elif self.first.kind_of[action.kind].gradient == "applies":
                waiting.pop(action.stage, None)
        return left + [Action("U", n, k) for k, n in waiting.items()]


@dataclass(frozen=True)
class Then(Schedule):
    """Two schedules in sequence; made by `then`."""

    @property
    def phases(self) -> Phases:
        """Both schedules, and the step between them."""
        assert isinstance(self.rule, Phases)
        return self.rule

    @property
    def start(self) -> int:
        return self.phases.steps

    @functools.cached_property
    def fill(self) -> int:
        return max(self.phases.first.fill, self.phases.second.fill)

    @functools.cached_property
    def counts(self) -> list[Counts]:
        """Delay and staleness of the second schedule; maxima of both for all other counts."""
        found = []
        both = (self.phases.first, self.phases.second)
        for one, two in zip(*(count(part, part.fill) for part in both), strict=True):
            slots = one.slots | two.slots
            found.append(
                Counts(
                    two.delay,
                    two.staleness,
                    two.mean_staleness,
                    max(one.in_flight, two.in_flight),
                    max(one.gradients, two.gradients),
                    slots,
                    one.pending or two.pending,
                )
            )
        return found

    def holdings(self, batches: int) -> Sequence[Holding]:
        first, steps, second = self.phases.first, self.phases.steps, self.phases.second
        if batches <= steps:
            return first.holdings(batches)
        drained = Ledger(first)
        drained.stages = list(first.holdings(steps))
        drained.run(self.phases.drain)
        late = second.holdings(batches - steps)
        for own, before in zip(late, drained.stages, strict=True):
            shift(own, steps * self.microbatches, before.version)
        return late


def then(first: Schedule, steps: int, second: Schedule) -> Schedule:
    """Switches from one schedule to another; the pipeline is drained in between.

    The usual start of asynchronous training: synchronous while the weights change fast, then
    asynchronous. Mini-batches in flight after ``steps`` mini-batches are finished in the tick in
    which the second schedule begins. `Pipeline.drain` restarts the sequence.

    Args:
      first: the schedule of the first ``steps`` mini-batches.
      steps: >= 1.
      second: the schedule from then on; must have the same micro-batches and reduction as the
        first, and forwards that do not name versions (unlike `pipedream_2bw`).

    Returns:
      A schedule whose delay and staleness are those of the second.

    Raises:
      ValueError: the two are incompatible.

    Example:
      >>> from fdg_jax import schedule
      >>> print(then(schedule.backprop(2), 2, schedule.fdg(2)).grid(5))
      tick | stage 0   stage 1
         0 | F0 B0 U   F0 B0 U
         1 | F1 B1 U   F1 B1 U
         2 | F2
         3 | F3        F2 B2 U
         4 | F4 B2 U   F3 B3 U

    References:
      Synchronous first is technique T3 of Yang et al., `PipeMare
      <https://arxiv.org/abs/1910.05124>`_, 2021.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: the first schedule must run for at least 1 mini-batch")
    for name, part in (("first", first), ("second", second)):
        if isinstance(part, Then):
            raise ValueError(f"{name}: {part.name} is a sequence already; give one schedule")
    for name in ("num_stages", "microbatches", "reduction", "kinds", "losses", "tied"):
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours != theirs:
            raise ValueError(
                f"second: {second.name} has {name}={theirs}, {first.name} has {ours}; both must "
                "have the same"
            )
    if second.versions > 1:
        raise ValueError(
            f"second: the forwards of {second.name} name weight versions, counted from its own "
            "start; only the first schedule may do so"
        )
    return Then(
        f"{first.name}_then_{second.name}",
        first.num_stages,
        Phases(first, steps, second),
        microbatches=first.microbatches,
        reduction=first.reduction,
        versions=first.versions,
        period=second.period,
        kinds=first.kinds,
        losses=first.losses,
        tied=first.tied,
    )
