"""Schedules without staleness: every update waits for its own mini-batch."""

from __future__ import annotations

from dataclasses import replace

from fdg_jax.schedule.action import Action, needs
from fdg_jax.schedule.schedule import Schedule


def backprop(num_stages: int) -> Schedule:
    """Ordinary back-propagation: every stage waits for its neighbours (all three locks).

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

    def rule(t: int) -> list[Action]:
        actions = [Action("F", t, k) for k in range(num_stages)]
        for k in reversed(range(num_stages)):
            actions += [Action("B", t, k), Action("U", t, k)]
        return actions

    return Schedule("backprop", num_stages, rule)


def gpipe(num_stages: int, microbatches: int = 4) -> Schedule:
    """Back-propagation of M micro-batches in a pipeline that empties at every update.

    All forwards, then all backwards in the opposite order, then one update with the mean. A tick is
    one mini-batch; on equal stages it takes (M + K - 1) / M times as long as one stage alone.

    Args:
      num_stages: K.
      microbatches: M, the parts of a mini-batch. Batch statistics are those of a part.

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
    parts = range(microbatches)

    order = [("F", m) for m in parts] + [("B", m) for m in reversed(parts)]
    plan = _interleave([order] * num_stages)

    def rule(t: int) -> list[Action]:
        return [replace(action, batch=t) for action in plan]

    return Schedule("gpipe", num_stages, rule, microbatches=microbatches)


def one_f_one_b(num_stages: int, microbatches: int = 4) -> Schedule:
    """One forward, one backward: as `gpipe`, but a stage holds at most K-k micro-batches.

    Stage k forwards K-1-k micro-batches, then forwards and back-propagates in turn, then finishes
    the backwards and updates with the mean: PipeDream-flush.

    Args:
      num_stages: K.
      microbatches: M, the parts of a mini-batch. Batch statistics are those of a part.

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

    def order(k: int) -> list[tuple[str, int]]:
        warm = min(num_stages - 1 - k, microbatches)
        actions = [("F", m) for m in range(warm)]
        for m in range(microbatches - warm):
            actions += [("F", warm + m), ("B", m)]
        return actions + [("B", m) for m in range(microbatches - warm, microbatches)]

    plan = _interleave([order(k) for k in range(num_stages)])

    def rule(t: int) -> list[Action]:
        return [replace(action, batch=t) for action in plan]

    return Schedule("one_f_one_b", num_stages, rule, microbatches=microbatches)


def _check(microbatches: int) -> None:
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches}: a mini-batch has at least one part")


def _interleave(orders: list[list[tuple[str, int]]]) -> list[Action]:
    """What each stage does of batch 0, in an order in which it can be dispatched; then updates.

    In every round each stage does the next action on its list if its inputs were there before.
    """
    kinds = [[Action(kind, 0, k, micro) for kind, micro in o] for k, o in enumerate(orders)]  # type: ignore[arg-type]
    done: set[Action] = set()
    actions = []
    while any(kinds):
        ready = [
            own[0] for own in kinds if own and all(n in done for n in needs(own[0], len(orders)))
        ]
        for action in ready:
            kinds[action.stage].pop(0)
        done.update(ready)
        actions += ready
    return actions + [Action("U", 0, k) for k in reversed(range(len(orders)))]
