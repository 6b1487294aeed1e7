"""Methods that are a schedule together with a choice of gradient."""

from __future__ import annotations

from typing import TypedDict

from fdg_jax.schedule import Schedule, ddg, fdg


class Preset(TypedDict):
    """The two arguments of `fdg_jax.Pipeline` that make a method."""

    schedule: Schedule
    gradient: str


def fr(num_stages: int) -> Preset:
    """Features replay: `ddg` whose backward runs the forward again at today's weights.

    Args:
      num_stages: K.

    Returns:
      Arguments for `fdg_jax.Pipeline`.

    Raises:
      ValueError: K < 1.

    Example:
      >>> fr(2)["gradient"]
      'recompute'

    References:
      Huo et al., `Training Neural Networks Using Features Replay
      <https://arxiv.org/abs/1807.04511>`_, 2018.
    """
    return Preset(schedule=ddg(num_stages), gradient="recompute")


def dsp(num_stages: int) -> Preset:
    """Diversely stale parameters: `fdg` whose backward runs the forward again at today's weights.

    Args:
      num_stages: K.

    Returns:
      Arguments for `fdg_jax.Pipeline`.

    Raises:
      ValueError: K < 1.

    Example:
      >>> dsp(3)["schedule"].staleness(0)
      4

    References:
      Xu et al., `Diversely Stale Parameters for Efficient Training of CNNs
      <https://arxiv.org/abs/1909.02625>`_, 2019.
    """
    return Preset(schedule=fdg(num_stages), gradient="recompute")
