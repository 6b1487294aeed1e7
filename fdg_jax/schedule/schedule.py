"""Schedules: a rule from ticks to actions, and the counts derived from it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fdg_jax.schedule import grid
from fdg_jax.schedule.action import ACTIVATION, COTANGENT, KINDS, Action, Kind, Port
from fdg_jax.schedule.counts import Counts, count, fill_of, stream
from fdg_jax.schedule.ledger import Holding, holdings
from fdg_jax.schedule.messages import given, taken

Rule = Callable[[int], Sequence[Action]]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Schedule:
    """A rule from ticks to actions, and the counts derived from it.

    Schedules are values: schedules with equal fields are equal; a schedule can be pickled if its
    rule can.

    Args:
      name: the common name of the schedule.
      num_stages: K.
      rule: a function from a tick to its actions in dispatch order. Actions of batches that do not
        exist (numbers below 0 during the fill, beyond the last during the drain) are dropped. A
        frozen dataclass with ``__call__`` is compared by its fields.
      microbatches: the number of micro-batches per mini-batch.
      reduction: how an update combines the gradients since the last: "mean" or "sum".
      versions: the number of weight versions a stage keeps for forwards that name their version.
      period: the number of ticks after which the rule repeats.
      kinds: the kinds of its actions.
      losses: the stages with a loss; empty: the last stage.
      predicts: the stages whose output cotangent is predicted by a synthesizer.
      tied: the stage that owns a tied array and the later stage that uses it, or None.

    Raises:
      ValueError: a number or a name out of bounds.
    """

    name: str
    num_stages: int
    rule: Rule
    microbatches: int = 1
    reduction: Reduction = "mean"
    versions: int = 1
    period: int = 1
    kinds: tuple[Kind, ...] = KINDS
    losses: tuple[int, ...] = ()
    predicts: tuple[int, ...] = ()
    tied: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages}: a network has at least one stage")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f'reduction={self.reduction!r}: allowed are "mean" and "sum"')
        if len(self.kind_of) < len(self.kinds):
            raise ValueError("kinds: two have one name; give each its own")
        if not self.losses:
            object.__setattr__(self, "losses", (self.num_stages - 1,))
        if not set(self.losses) <= set(range(self.num_stages)):
            raise ValueError(f"losses={self.losses}: must name stages, 0 to {self.num_stages - 1}")
        if not set(self.predicts) <= set(range(self.num_stages)) - set(self.losses):
            raise ValueError(
                f"predicts={self.predicts}: must name stages without a loss, of 0 to "
                f"{self.num_stages - 1}"
            )

    @functools.cached_property
    def kind_of(self) -> dict[str, Kind]:
        """The kinds of action by name."""
        return {kind.name: kind for kind in self.kinds}

    @functools.cached_property
    def splits_backward(self) -> bool:
        """Whether backwards are split into an input and a weight half."""
        return any(kind.in_flight == "reads" and kind.gradient == "none" for kind in self.kinds)

    @functools.cached_property
    def labelled(self) -> tuple[int, ...]:
        """The stages that use labels: those with a loss or a synthesizer."""
        return tuple(sorted({*self.losses, *self.predicts}))

    def gives(self, kind: Kind, k: int) -> Iterator[tuple[str, int]]:
        """The messages that an action of stage k sends: pairs of port and receiving stage."""
        return given(self, kind, k)

    def takes(self, kind: Kind, k: int) -> tuple[Port, ...]:
        """The messages that an action of stage k consumes."""
        return taken(self, kind, k)

    @functools.cached_property
    def sources(self) -> dict[str, list[list[tuple[tuple[str, int], ...]]]]:
        """For each kind and stage: the dependencies within a batch, each a tuple of alternative
        actions, given as kind and stage."""
        opener = next((kind.name for kind in self.kinds if kind.in_flight == "opens"), "F")
        found: dict[str, list[list[tuple[tuple[str, int], ...]]]] = {}
        for kind in self.kinds:
            found[kind.name] = []
            for k in range(self.num_stages):
                needs: list[tuple[tuple[str, int], ...]] = []
                if kind.in_flight in ("reads", "closes"):
                    needs.append(((opener, k),))
                for port in kind.takes:
                    if port.name == ACTIVATION and k == 0:
                        continue  # the mini-batch itself
                    if port.name == COTANGENT and k in self.losses:
                        continue  # of the loss: from the stage's own forward
                    givers = tuple(
                        (other.name, k - hop)
                        for other in self.kinds
                        for name, hop in other.gives
                        if name == port.name and 0 <= k - hop < self.num_stages
                    )
                    needs += [givers] if givers else []
                found[kind.name].append(list(dict.fromkeys(needs)))
        return found

    def needs(self, action: Action) -> list[Action]:
        """The dependencies of an action.

        If one of several actions may give an input, all of them are listed.

        Args:
          action: an action of this schedule.

        Returns:
          Actions of the same micro-batch; none for an update.

        Example:
          >>> from fdg_jax import schedule
          >>> [str(need) for need in schedule.fdg(3).needs(Action("B", 4, 1))]
          ['F4@1', 'B4@2']
        """
        found = self.sources[action.kind][action.stage]
        every = dict.fromkeys(need for alternatives in found for need in alternatives)
        every.pop((action.kind, action.stage), None)  # kinds that return the message they take
        return [Action(kind, action.batch, k, action.micro) for kind, k in every]

    def tick(self, t: int, end: int | None = None) -> list[Action]:
        """The actions of one tick.

        Args:
          t: number of the tick; 0 is the first of the fill.
          end: batches 0..end-1 exist; None: no limit.

        Returns:
          Actions in a valid dispatch order.

        Example:
          >>> from fdg_jax import schedule
          >>> [str(action) for action in schedule.fdg(2).tick(2)]
          ['F1@1', 'B1@1', 'U@1', 'F2@0', 'B0@0', 'U@0']
        """
        return [a for a in self.rule(t) if a.batch >= 0 and (end is None or a.batch < end)]

    def stream(self, batches: int) -> Iterator[list[Action]]:
        """The actions of a run, tick by tick, from the fill to the drain.

        Args:
          batches: number of mini-batches.

        Returns:
          The actions of each tick. A last, incomplete accumulation is applied at the end.

        Raises:
          ValueError: the rule is not a valid pipeline: an action occurs twice, before its
            dependencies, in a stage that does not exist, or never.
        """
        return stream(self, batches)

    @functools.cached_property
    def fill(self) -> int:
        """The number of ticks before the first backward of stage 0.

        Raises:
          ValueError: there is no such backward.
        """
        return fill_of(self)

    @functools.cached_property
    def counts(self) -> list[Counts]:
        """The counts of every stage; see `Counts`.

        Raises:
          ValueError: the rule is not a valid pipeline, as in `stream`.
        """
        return count(self, self.fill)

    @property
    def start(self) -> int:
        """The tick at which counting begins; 0 except for `then`."""
        return 0

    def holdings(self, batches: int) -> Sequence[Holding]:
        """The contents of each stage after the given number of mini-batches.

        Args:
          batches: number of mini-batches since the last drain.

        Returns:
          One `Holding` per stage.
        """
        return holdings(self, batches)

    def delay(self, k: int) -> int:
        """Ticks between the forward and the backward of one mini-batch.

        Args:
          k: the stage, 0..K-1.

        Returns:
          Ticks in steady state.

        Raises:
          ValueError: there is no stage k.
        """
        return self._of(k).delay

    def staleness(self, k: int) -> int:
        """Updates of a stage between a batch's forward and the application of its gradient.

        Args:
          k: the stage, 0..K-1.

        Returns:
          The largest in steady state; see `mean_staleness`.

        Raises:
          ValueError: there is no stage k.
        """
        return self._of(k).staleness

    def mean_staleness(self, k: int) -> float:
        """The mean staleness, of which `staleness` is the maximum.

        Args:
          k: the stage, 0..K-1.

        Returns:
          Updates.

        Raises:
          ValueError: there is no stage k.
        """
        return self._of(k).mean_staleness

    def in_flight(self, k: int) -> int:
        """The maximum number of mini-batches that are forwarded but not yet applied in a stage.

        Args:
          k: the stage, 0..K-1.

        Returns:
          Mini-batches; one that is partly in flight counts as one.

        Raises:
          ValueError: there is no stage k.
        """
        return self._of(k).in_flight

    def gradients(self, k: int) -> int:
        """The maximum number of gradients in one update of a stage.

        Args:
          k: the stage, 0..K-1.

        Returns:
          1 without accumulation.

        Raises:
          ValueError: there is no stage k.
        """
        return self._of(k).gradients

    def _of(self, k: int) -> Counts:
        if not 0 <= k < self.num_stages:
            raise ValueError(f"k={k}: schedule {self.name} has stages 0 to {self.num_stages - 1}")
        return self.counts[k]

    @property
    def fingerprint(self) -> str:
        """A short hash of all properties of the schedule.

        A dataclass rule is hashed by its fields, others by their actions during and after the fill.
        """
        fields = [field.name for field in dataclasses.fields(self)]
        values = [getattr(self, name) for name in fields if name != "tied" or self.tied]
        if not dataclasses.is_dataclass(self.rule):
            ticks = range(2 * self.fill + 2 * self.period)
            values[2] = [[tuple(action) for action in self.tick(t)] for t in ticks]
        return hashlib.sha256(repr(values).encode()).hexdigest()[:12]

    def grid(self, ticks: int) -> str:
        """The schedule as text, with ticks down and stages across.

        Args:
          ticks: number of ticks, from the start of the fill.

        Returns:
          Lines, the first with the column heads; `fdg_jax.schedule.parse` reads them.
        """
        return grid.write([self.tick(t) for t in range(ticks)], self.num_stages)

    def __str__(self) -> str:
        return self.grid(2 * self.num_stages)
