"""Schedules with delayed gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fdg_jax.schedule.action import LOCAL_KINDS, Action
from fdg_jax.schedule.schedule import Reduction, Schedule

Order = Literal["forward_first", "backward_first"]


@dataclass(frozen=True)
class Decoupled:
    """Tick t of FDG and ADL: stage k forwards batch t-k, back-propagates batch t-2(K-1)+k."""

    num_stages: int
    accumulate: int
    order: Order

    def __call__(self, t: int) -> list[Action]:
        last, actions = self.num_stages - 1, []
        for k in reversed(range(self.num_stages)):
            forward = [Action("F", t - k, k)]
            back = _back(t - 2 * last + k, k, self.accumulate)
            first = self.order == "forward_first" or k == last
            actions += forward + back if first else back + forward
        return actions


@dataclass(frozen=True)
class Locked:
    """Tick t of DDG and PipeDream: stage k forwards batch t, back-propagates batch t-(K-1-k)."""

    num_stages: int
    accumulate: int = 1
    two_versions: bool = False

    def __call__(self, t: int) -> list[Action]:
        version = max(t // self.accumulate - 1, 0) if self.two_versions else None
        actions = [Action("F", t, k, version=version) for k in range(self.num_stages)]
        for k in reversed(range(self.num_stages)):
            actions += _back(t - (self.num_stages - 1 - k), k, self.accumulate)
        return actions


@dataclass(frozen=True)
class Local:
    """Tick t of local learning: stage k forwards batch t-k and trains on it immediately."""

    num_stages: int

    def __call__(self, t: int) -> list[Action]:
        stages = reversed(range(self.num_stages))
        return [Action(kind, t - k, k) for k in stages for kind in "FBU"]


def fdg(num_stages: int, order: Order = "forward_first") -> Schedule:
    """Fully decoupled learning with delayed gradients: no locks.

    In tick t stage k forwards batch t-k, back-propagates batch t-2(K-1)+k and updates. A message
    sent in one tick is used in the next. The last stage runs forward, backward and update of one
    batch in one tick.

    Args:
      num_stages: K.
      order: the first action of a tick in all stages but the last. "forward_first" is the paper's
        figure, staleness 2(K-1-k); "backward_first" is the authors' code, staleness 2(K-1-k)-1 for
        k < K-1.

    Returns:
      Delay 2(K-1-k) in stage k.

    Raises:
      ValueError: K < 1, or another order.

    Example:
      >>> print(fdg(2).grid(3))
      tick | stage 0   stage 1
         0 | F0
         1 | F1        F0 B0 U
         2 | F2 B0 U   F1 B1 U

    References:
      Zhuang et al., `Fully Decoupled Neural Network Learning Using Delayed Gradients
      <https://arxiv.org/abs/1906.09108>`_, 2022.
    """
    _check_order(order)
    return Schedule("fdg", num_stages, Decoupled(num_stages, 1, order))


def adl(
    num_stages: int,
    accumulate: int = 2,
    reduction: Reduction = "mean",
    order: Order = "forward_first",
) -> Schedule:
    """Accumulated decoupled learning: FDG with one update per M backwards.

    The weights change M times less often, which reduces the mean staleness of stage k from 2(K-1-k)
    to about 2(K-1-k)/M.

    Args:
      num_stages: K.
      accumulate: M; 1 is FDG.
      reduction: "mean" of the M gradients, as in the paper, or "sum", as in the authors' code.
      order: as in `fdg`.

    Returns:
      Delay 2(K-1-k) in stage k.

    Raises:
      ValueError: K < 1, M < 1, or another reduction or order.

    Example:
      >>> print(adl(2, accumulate=2).grid(4))
      tick | stage 0   stage 1
         0 | F0
         1 | F1        F0 B0
         2 | F2 B0     F1 B1 U
         3 | F3 B1 U   F2 B2

    References:
      Zhuang et al., `Accumulated Decoupled Learning: Mitigating Gradient Staleness in Inter-Layer
      Model Parallelization <https://arxiv.org/abs/2012.03747>`_, 2020.
    """
    _check_order(order)
    _check_accumulate(accumulate, least=1)
    rule = Decoupled(num_stages, accumulate, order)
    return Schedule("adl", num_stages, rule, reduction=reduction, period=accumulate)


def ddg(num_stages: int) -> Schedule:
    """Decoupled backward: delayed gradients with half of FDG's staleness.

    In tick t every stage forwards batch t, one stage after the other; then stage k back-propagates
    batch t-(K-1-k) using the error gradient computed by the next stage in the previous tick. The
    authors' code locks the forward: a batch passes all stages before the next one enters. Here a
    stage's forward waits only for its own input.

    Args:
      num_stages: K.

    Returns:
      Delay and staleness K-1-k in stage k.

    Raises:
      ValueError: K < 1.

    Example:
      >>> print(ddg(2).grid(3))
      tick | stage 0   stage 1
         0 | F0        F0 B0 U
         1 | F1 B0 U   F1 B1 U
         2 | F2 B1 U   F2 B2 U

    References:
      Huo et al., `Decoupled Parallel Backpropagation with Convergence Guarantee
      <https://arxiv.org/abs/1804.10574>`_, 2018.
    """

    return Schedule("ddg", num_stages, Locked(num_stages))


def pipedream(num_stages: int) -> Schedule:
    """PipeDream: alternating forwards and backwards without a flush, with weight stashing.

    Stage k forwards K-k batches, then alternates backwards and forwards, updating after every
    backward. The actions per stage equal those of `ddg`. DDG was published with a locked forward
    and does not specify how the weights of a forward are kept for its backward; PipeDream does not
    lock the forward and stashes the weights (``gradient="stale"``).

    Args:
      num_stages: K.

    Returns:
      Delay and staleness K-1-k in stage k.

    Raises:
      ValueError: K < 1.

    Example:
      >>> print(pipedream(2).grid(2))
      tick | stage 0   stage 1
         0 | F0        F0 B0 U
         1 | F1 B0 U   F1 B1 U

    References:
      Harlap et al., `PipeDream: Fast and Efficient Pipeline Parallel DNN Training
      <https://arxiv.org/abs/1806.03377>`_, 2018.
    """
    return Schedule("pipedream", num_stages, Locked(num_stages))


def pipedream_2bw(num_stages: int, accumulate: int | None = None) -> Schedule:
    """PipeDream-2BW: two weight versions; every gradient is one update old in every stage.

    `pipedream` with one update per m backwards. All m batches of a group use the same weights in
    all stages, those before the last update: ``F5v1`` is the forward of batch 5 with the weights
    after one update.

    .. math::
        w^{(t+1)} = w^{(t)} - \\eta \\, \\nabla f\\left(w^{(t-1)}\\right)

    Args:
      num_stages: K.
      accumulate: m >= K; None is K.

    Returns:
      Delay K-1-k, staleness 1 in every stage.

    Raises:
      ValueError: K < 1 or m < K.

    Example:
      >>> print(pipedream_2bw(2).grid(6))
      tick | stage 0     stage 1
         0 | F0v0        F0v0 B0
         1 | F1v0 B0     F1v0 B1 U
         2 | F2v0 B1 U   F2v0 B2
         3 | F3v0 B2     F3v0 B3 U
         4 | F4v1 B3 U   F4v1 B4
         5 | F5v1 B4     F5v1 B5 U

    References:
      Narayanan et al., `Memory-Efficient Pipeline-Parallel DNN Training
      <https://arxiv.org/abs/2006.09503>`_, section 3.1, 2021.
    """
    m = num_stages if accumulate is None else accumulate
    _check_accumulate(m, least=num_stages)

    rule = Locked(num_stages, m, two_versions=True)
    return Schedule("pipedream_2bw", num_stages, rule, versions=2, period=m)


def local(num_stages: int) -> Schedule:
    """Decoupled greedy learning: every stage trains on its own loss.

    Messages go up only. The pipeline needs a loss for every stage.

    Args:
      num_stages: K.

    Returns:
      Delay 0, staleness 0 in every stage.

    Raises:
      ValueError: K < 1.

    Example:
      >>> print(local(2).grid(3))
      tick | stage 0   stage 1
         0 | F0 B0 U
         1 | F1 B1 U   F0 B0 U
         2 | F2 B2 U   F1 B1 U

    References:
      Belilovsky, Eickenberg, Oyallon: `Decoupled Greedy Learning of CNNs
      <https://arxiv.org/abs/1901.08164>`_, 2020.
    """
    stages = tuple(range(max(num_stages, 0)))
    return Schedule("local", num_stages, Local(num_stages), kinds=LOCAL_KINDS, losses=stages)


def _back(n: int, k: int, accumulate: int) -> list[Action]:
    """The backward of batch n, and the update if it completes a group of ``accumulate``."""
    return [Action("B", n, k)] + ([Action("U", n, k)] if (n + 1) % accumulate == 0 else [])


def _check_order(order: str) -> None:
    if order not in ("forward_first", "backward_first"):
        raise ValueError(f'order={order!r}: allowed are "forward_first" and "backward_first"')


def _check_accumulate(accumulate: int, least: int) -> None:
    if accumulate < least:
        raise ValueError(f"accumulate={accumulate}: must be {least} or more for this schedule")
