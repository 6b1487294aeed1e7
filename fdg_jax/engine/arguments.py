"""Normalisation and validation of the arguments of a pipeline."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import optax

from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.loss import loss_of_part
from fdg_jax.engine.network_optimizer import NetworkOptimizer
from fdg_jax.engine.nonfinite import ON_NONFINITE
from fdg_jax.engine.synthesizer import Synthesizer
from fdg_jax.layer import Layer
from fdg_jax.optim import StageOptimizer
from fdg_jax.partition.network import Place, has_head
from fdg_jax.schedule import Schedule
from fdg_jax.typing import LossFn, LossOfPart

Optimizer: TypeAlias = optax.GradientTransformation | StageOptimizer
Optimizers: TypeAlias = Optimizer | Callable[[int], Optimizer] | Callable[[int, range], Optimizer]
Synthesizers: TypeAlias = Synthesizer | Callable[[int], Synthesizer] | None


def check_arguments(num_stages: int, schedule: Schedule, max_ahead: int, on_nonfinite: str) -> None:
    """Rejects invalid combinations of arguments of `Pipeline`.

    Raises:
      ValueError: the message names the argument and the remedy.
    """
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule={schedule!r}: is no Schedule; give one, such as "
            f"fdg_jax.schedule.fdg({num_stages})"
        )
    if num_stages != schedule.num_stages:
        raise ValueError(
            f"schedule: {schedule.name} is made for {schedule.num_stages} stages, but stages has "
            f"{num_stages}; make both with the same number: "
            f"fdg_jax.partition(layers, {schedule.num_stages}, example)"
        )
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite={on_nonfinite!r}: allowed are {', '.join(ON_NONFINITE)}")
    if not isinstance(max_ahead, int) or max_ahead < 1:
        raise ValueError(f"max_ahead={max_ahead}: the host must be allowed at least one tick")
    # Rejects an invalid schedule now instead of in the middle of a run.
    schedule.in_flight(0)


def losses_of(
    loss_fn: LossFn | Sequence[LossFn | None], schedule: Schedule
) -> list[LossOfPart | None]:
    """The loss of every stage, or None."""
    if callable(loss_fn):
        if len(schedule.losses) > 1:
            raise ValueError(
                f"loss_fn: schedule {schedule.name} has losses in stages "
                f"{', '.join(map(str, schedule.losses))}; give a list of {schedule.num_stages}"
            )
        one = loss_of_part(loss_fn, schedule.microbatches)
        return [one if k in schedule.losses else None for k in range(schedule.num_stages)]
    if not isinstance(loss_fn, Sequence) or any(not (v is None or callable(v)) for v in loss_fn):
        raise ValueError(
            f"loss_fn={loss_fn!r}: must be a function of outputs and labels, or a list of such "
            "functions and None, one for each stage"
        )
    given = list(loss_fn)
    there = tuple(k for k, one in enumerate(given) if one is not None)
    if len(given) != schedule.num_stages or there != tuple(sorted(schedule.losses)):
        raise ValueError(
            f"loss_fn: a list of {len(given)} with losses in stages {there}; schedule "
            f"{schedule.name} needs {schedule.num_stages}, with losses in {schedule.losses} and "
            "None elsewhere"
        )
    return [None if one is None else loss_of_part(one, schedule.microbatches) for one in given]


def optimizer_of(given: Optimizers, k: int, layers: range) -> StageOptimizer:
    """The optimizer of stage k with the given layers, from any accepted form."""
    if isinstance(given, (optax.GradientTransformation, StageOptimizer)):
        return StageOptimizer.of(given)
    if not callable(given):
        raise ValueError(
            f"optimizer: {given!r} is neither an optax transformation nor a function of the stage; "
            "give optax.sgd(0.1), or lambda k: optax.sgd(0.1)"
        )
    if (getattr(given, "__module__", None) or "").startswith("optax"):
        name = getattr(given, "__name__", "sgd")
        raise ValueError(
            f"optimizer: optax.{name} would be called with the number of a stage; give "
            f"optax.{name}(...), or lambda k: optax.{name}(...)"
        )
    wanted = [
        parameter.name
        for parameter in inspect.signature(given).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    try:
        made = given(k, layers) if len(wanted) == 2 else given(k)  # type: ignore[call-arg]
    except Exception as error:
        raise ValueError(
            f"optimizer: called with stage {k} it fails: {type(error).__name__}: {error}; give "
            "optax.sgd(0.1), or lambda k: optax.sgd(0.1)"
        ) from error
    return made.given if isinstance(made, NetworkOptimizer) else StageOptimizer.of(made)


def optimizers_of(given: Optimizers, stages: Sequence[Layer]) -> list[NetworkOptimizer]:
    """The optimizer of every stage, at its place in the network."""
    return [
        NetworkOptimizer.at(place, optimizer_of(given, k, place.layers))
        for k, place in enumerate(places_of(stages))
    ]


def places_of(stages: Sequence[Layer]) -> list[Place]:
    """The place of each stage in the network."""
    starts = list(itertools.accumulate((stage.size for stage in stages), initial=0))
    headed = any(map(has_head, stages))
    return [
        Place(stage, start, starts[-1], headed)
        for stage, start in zip(stages, starts, strict=False)
    ]


def synthesizers_of(
    given: Synthesizers, schedule: Schedule, rule: GradientRule
) -> list[Synthesizer | None]:
    """The synthesizer of every stage that predicts, or None."""
    if bool(schedule.predicts) != (given is not None) and schedule.num_stages > 1:
        needs = f"predicts in stages {schedule.predicts}" if schedule.predicts else "has none"
        raise ValueError(
            f"synthesizers={given!r}: schedule {schedule.name} {needs}; give synthesizers exactly "
            "where a schedule predicts"
        )
    if schedule.predicts and rule.reconstructs:
        raise ValueError(
            f"gradient={rule.name!r}: a prediction comes without the output that this rule needs; "
            'take "stale", "recompute_stale" or "recompute"'
        )
    found: list[Synthesizer | None] = []
    for k in range(schedule.num_stages):
        if k not in schedule.predicts:
            found.append(None)
            continue
        one = given if isinstance(given, Synthesizer) or given is None else given(k)
        if not isinstance(one, Synthesizer):
            raise ValueError(
                f"synthesizers: {one!r} for stage {k} is no Synthesizer; give "
                "fdg_jax.Synthesizer(layer, optimizer)"
            )
        found.append(one)
    return found
