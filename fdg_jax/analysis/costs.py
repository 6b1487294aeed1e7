"""Costs of the actions of a schedule: seconds and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.rules import gradient_rule
from fdg_jax.schedule import Action, Schedule
from fdg_jax.schedule.action import TIED, TIED_GRADIENT


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of one undivided mini-batch; each of M micro-batches has 1/M of them.

    Args:
      forward: seconds, one per stage.
      backward: seconds, one per stage.
      update: seconds, one per stage; empty: 0.
      weights: seconds of the weight half of a split backward, included in ``backward``; one per
        stage; empty: half of it.
      transfer: seconds of a message between neighbours, one per hop (K - 1) or one for all, for
        activations and gradients. Transfers overlap with computation and with each other.
      latency: additional seconds of every message, not divided by M.
      input_bytes: size of a stage's input, one per stage; empty: 0.
      kept_bytes: data that a stage stores per batch if it reconstructs its inputs: the inputs of
        layers without an inverse (`fdg_jax.engine.reversible.kept_by`); one per stage; empty: its
        input.
      residual_bytes: residuals of a forward except input and weights, one per stage; empty: 0.
      parameter_bytes: one version of a stage's weights, one per stage; empty: 0.
      cotangent_bytes: message to the previous stage, one per stage; empty: input_bytes.
      optimizer: size of the optimizer's state as a multiple of the parameters; 1 for momentum.

    Raises:
      ValueError: lengths do not match, a number is negative or not finite, or all times are 0.

    Example:
      >>> Costs(forward=[1, 1, 1], backward=[2, 2, 2], transfer=0.5).transfer
      (0.5, 0.5)
    """

    forward: Sequence[float]
    backward: Sequence[float]
    update: Sequence[float] = ()
    transfer: Sequence[float] | float = 0
    latency: float = 0
    input_bytes: Sequence[float] = ()
    residual_bytes: Sequence[float] = ()
    parameter_bytes: Sequence[float] = ()
    optimizer: float = 0
    weights: Sequence[float] = ()
    kept_bytes: Sequence[float] = ()
    cotangent_bytes: Sequence[float] = ()

    def __post_init__(self) -> None:
        stages = len(self.forward)
        if not stages:
            raise ValueError("forward=[]: a network has at least one stage; give one number each")
        given = self.transfer
        hops = tuple(given) if isinstance(given, Sequence) else (given,) * (stages - 1)
        object.__setattr__(self, "transfer", hops)
        for name in PER_STAGE:
            values = tuple(getattr(self, name))
            if not values and name not in ("forward", "backward"):
                values = (0,) * stages
                if name == "weights":
                    values = tuple(seconds / 2 for seconds in self.backward)
                elif name in ("kept_bytes", "cotangent_bytes"):
                    values = tuple(self.input_bytes)
            object.__setattr__(self, name, values)
            if len(values) != stages:
                raise ValueError(
                    f"{name}: {len(values)} numbers for the {stages} stages of forward; "
                    "give one per stage"
                )
        if len(hops) != stages - 1:
            raise ValueError(
                f"transfer: {len(hops)} numbers for {stages} stages; give one per hop, "
                f"{stages - 1}, or one for all"
            )
        for name in (*PER_STAGE, "transfer"):
            for k, value in enumerate(getattr(self, name)):
                _check_number(f"{name}[{k}]", value)
        for k, (part, whole) in enumerate(zip(self.weights, self.backward, strict=True)):
            if part > whole:
                raise ValueError(
                    f"weights[{k}]={part}: is a part of backward[{k}]={whole}; give that or less"
                )
        _check_number("latency", self.latency)
        _check_number("optimizer", self.optimizer)
        if not any((*self.forward, *self.backward)):
            raise ValueError("forward, backward: all 0; at least one stage must take some time")

    def seconds(
        self, action: Action, schedule: Schedule, gradient: str | GradientRule = "stale"
    ) -> float:
        """The duration of an action.

        Args:
          action: the action.
          schedule: its schedule.
          gradient: the gradient rule; a backward that recomputes the forward includes its time.

        Returns:
          Seconds.
        """
        kind, k = schedule.kind_of[action.kind], action.stage
        if kind.gradient == "applies":
            return self.update[k]
        if kind.in_flight == "opens":
            return self.forward[k] / schedule.microbatches
        if kind.in_flight == "none":
            return 0  # training of a synthesizer is not counted
        whole = self.backward[k]
        if kind.gradient == "none":
            whole -= self.weights[k]
        elif schedule.splits_backward and not kind.gives:
            whole = self.weights[k]
        # Recomputation does not depend on the staleness, so 0 is passed instead of counting it.
        own = gradient_rule(gradient).of_stage(k in schedule.losses, 0)
        if not own.keeps_residuals:
            whole += self.forward[k]
        return whole / schedule.microbatches

    def sent_bytes(self, k: int, schedule: Schedule) -> float:
        """Bytes sent between stages k and k+1 per mini-batch, in both directions.

        .. math::
            u \\cdot \\text{input}_{k+1} + d \\cdot \\text{cotangent}_{k+1}

        with u messages up and d down for each micro-batch, counted in steady state: one each,
        except for "local", where d = 0. Tied arrays are not counted.

        Args:
          k: the hop, 0 to K-2.
          schedule: the schedule, for its kinds of action.

        Returns:
          Bytes; 0 if sizes are not given.

        Raises:
          ValueError: no such hop.

        Example:
          >>> from fdg_jax import schedule
          >>> its = Costs(forward=[1, 1], backward=[2, 2], input_bytes=[9, 4])
          >>> its.sent_bytes(0, schedule.fdg(2)), its.sent_bytes(0, schedule.local(2))
          (8.0, 4.0)
        """
        if not 0 <= k < len(self.forward) - 1:
            raise ValueError(f"k={k}: no hop of {len(self.forward)} stages; they go from 0 to K-2")
        begin = schedule.start + 4 * (schedule.fill + 1)
        actions = (a for t in range(schedule.period) for a in schedule.tick(begin + t))
        sent = [
            (action.stage, stage)
            for action in actions
            for port, stage in schedule.gives(schedule.kind_of[action.kind], action.stage)
            if port not in (TIED, TIED_GRADIENT)
        ]
        up, down = sent.count((k, k + 1)), sent.count((k + 1, k))
        total = up * self.input_bytes[k + 1] + down * self.cotangent_bytes[k + 1]
        return total / (schedule.period * schedule.microbatches)


PER_STAGE = (
    "forward",
    "backward",
    "update",
    "input_bytes",
    "residual_bytes",
    "parameter_bytes",
    "weights",
    "kept_bytes",
    "cotangent_bytes",
)


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value}: must be finite and 0 or more")
