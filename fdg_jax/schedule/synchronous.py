"""Synchronous schedules: every update waits for its own mini-batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from fdg_jax.schedule.action import SPLIT_KINDS, Action
from fdg_jax.schedule.schedule import Schedule


@dataclass(frozen=True)
class Sequential:
    """Tick t of back-propagation: batch t passes forward and backward through all stages."""

    num_stages: int

    def __call__(self, t: int) -> list[Action]:
        actions = [Action("F", t, k) for k in range(self.num_stages)]
        for k in reversed(range(self.num_stages)):
            actions += [Action("B", t, k), Action("U", t, k)]
        return actions


@dataclass(frozen=True)
class Microbatched:
    """Tick t: all micro-batches of batch t, in an order per stage, followed by updates."""

    name: Literal["gpipe", "one_f_one_b", "zero_bubble"]
    num_stages: int
    microbatches: int

    def __call__(self, t: int) -> list[Action]:
        return [action._replace(batch=t) for action in self._plan]

    @functools.cached_property
    def _plan(self) -> list[Action]:
        """The actions of batch 0 in a valid dispatch order.

        In every round each stage runs the next action of its order if its inputs are available.
        """
        order = {"gpipe": _gpipe, "one_f_one_b": _one_f_one_b, "zero_bubble": _zero_bubble}
        rows = [order[self.name](k, self.num_stages, self.microbatches) for k in self._stages]
        done: set[tuple[str, int, int]] = set()
        position, actions = [0] * self.num_stages, []
        last = self.num_stages - 1

        def ready(kind: str, m: int, k: int) -> bool:
            if kind == "F":
                return k == 0 or ("F", m, k - 1) in done
            if kind == "W":
                return True  # the same stage's B precedes it in the order
            return ("F", m, k) in done if k == last else ("B", m, k + 1) in done

        while any(position[k] < len(row) for k, row in enumerate(rows)):
            heads = [(*row[position[k]], k) for k, row in enumerate(rows) if position[k] < len(row)]
            found = [head for head in heads if ready(*head)]
            for kind, m, k in found:
                position[k] += 1
                actions.append(Action(kind, 0, k, m))
            done.update(found)
        return actions + [Action("U", 0, k) for k in reversed(self._stages)]

    @property
    def _stages(self) -> range:
        return range(self.num_stages)


Order = list[tuple[str, int]]


def _gpipe(k: int, num_stages: int, microbatches: int) -> Order:
    del k, num_stages
    parts = range(microbatches)
    return [("F", m) for m in parts] + [("B", m) for m in reversed(parts)]


def _one_f_one_b(k: int, num_stages: int, microbatches: int) -> Order:
    warm = min(num_stages - 1 - k, microbatches)
    order = [("F", m) for m in range(warm)]
    for m in range(microbatches - warm):
        order += [("F", warm + m), ("B", m)]
    return order + [("B", m) for m in range(microbatches - warm, microbatches)]


def _zero_bubble(k: int, num_stages: int, microbatches: int) -> Order:
    """1F1B with W of micro-batch m delayed by k backwards, so that stage 0 never waits."""
    order: Order = []
    for kind, m in _one_f_one_b(k, num_stages, microbatches):
        order.append((kind, m))
        if kind == "B" and m >= k:
            order.append(("W", m - k))
    return order + [("W", m) for m in range(max(microbatches - k, 0), microbatches)]


def backprop(num_stages: int) -> Schedule:
    """Back-propagation: every stage waits for its neighbours (all three locks).

    Args:
      num_stages: K.

    Returns:
      Delay 0, staleness 0 in every stage.

    Raises:
      ValueError: K < 1.

    Example:
      >>> print(backprop(2).grid(2))
      tick | stage 0   stage 1
         0 | F0 B0 U   F0 B0 U
         1 | F1 B1 U   F1 B1 U

    References:
      Rumelhart, Hinton, Williams: Learning representations by back-propagating errors, Nature 323,
      1986; the three locks: Jaderberg et al., `Decoupled Neural Interfaces
      <https://arxiv.org/abs/1608.05343>`_, 2017.
    """

    return Schedule("backprop", num_stages, Sequential(num_stages))


def gpipe(num_stages: int, microbatches: int = 4) -> Schedule:
    """Back-propagation of M micro-batches in a pipeline that is flushed at every update.

    All forwards, then all backwards in the opposite order, then one update with the mean. A tick is
    one mini-batch; on equal stages it takes (M + K - 1) / M times as long as one stage alone.

    Args:
      num_stages: K.
      microbatches: M micro-batches per mini-batch; batch statistics are per micro-batch.

    Returns:
      Delay 0, staleness 0.

    Raises:
      ValueError: K < 1 or M < 1.

    Example:
      >>> print(gpipe(2, microbatches=2).grid(1))
      tick | stage 0                 stage 1
         0 | F0.0 F0.1 B0.1 B0.0 U   F0.0 F0.1 B0.1 B0.0 U

    References:
      Huang et al., `GPipe <https://arxiv.org/abs/1811.06965>`_, figure 2c, 2019.
    """
    _check(microbatches)
    rule = Microbatched("gpipe", num_stages, microbatches)
    return Schedule("gpipe", num_stages, rule, microbatches=microbatches)


def one_f_one_b(num_stages: int, microbatches: int = 4) -> Schedule:
    """One forward, one backward: like `gpipe`, but a stage holds at most K-k micro-batches.

    Stage k forwards K-1-k micro-batches, then forwards and back-propagates in turn, then finishes
    the backwards and updates with the mean: PipeDream-flush.

    Args:
      num_stages: K.
      microbatches: M micro-batches per mini-batch; batch statistics are per micro-batch.

    Returns:
      Delay 0, staleness 0.

    Raises:
      ValueError: K < 1 or M < 1.

    Example:
      >>> print(one_f_one_b(2, microbatches=2).grid(1))
      tick | stage 0                 stage 1
         0 | F0.0 F0.1 B0.0 B0.1 U   F0.0 B0.0 F0.1 B0.1 U

    References:
      Narayanan et al., `Memory-Efficient Pipeline-Parallel DNN Training
      <https://arxiv.org/abs/2006.09503>`_, section 2.2, 2021.
    """
    _check(microbatches)

    rule = Microbatched("one_f_one_b", num_stages, microbatches)
    return Schedule("one_f_one_b", num_stages, rule, microbatches=microbatches)


def zero_bubble(num_stages: int, microbatches: int = 4) -> Schedule:
    """ZB-H1: `one_f_one_b` with split backwards, which fill part of the bubble.

    B is the half of a backward needed by the previous stage, W the half needed only by the stage's
    own update; W runs where the stage would idle. With equal times of F, B and W the bubble is a
    third of 1F1B's. Here W repeats the backward through the stage's layers, since only residuals
    of the forward are stored: use it for comparisons, or for stages of one layer.

    Args:
      num_stages: K.
      microbatches: M micro-batches per mini-batch; batch statistics are per micro-batch.

    Returns:
      Delay 0, staleness 0.

    Raises:
      ValueError: K < 1 or M < 1.

    Example:
      >>> print(zero_bubble(2, microbatches=2).grid(1))
      tick | stage 0                           stage 1
         0 | F0.0 F0.1 B0.0 W0.0 B0.1 W0.1 U   F0.0 B0.0 F0.1 B0.1 W0.0 W0.1 U

    References:
      Qi et al., `Zero Bubble Pipeline Parallelism <https://arxiv.org/abs/2401.10241>`_,
      2023.
    """
    _check(microbatches)
    rule = Microbatched("zero_bubble", num_stages, microbatches)
    return Schedule("zero_bubble", num_stages, rule, microbatches=microbatches, kinds=SPLIT_KINDS)


def _check(microbatches: int) -> None:
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches}: a mini-batch has at least one part")
