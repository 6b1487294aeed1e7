"""Remedies for stale gradients: the flags of both programs, and a stage's optimizer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax
import optax

import fdg_jax as fdg
from experiments.common.errors import UsageError
from fdg_jax.optim import Staleness, recipes
from fdg_jax.typing import PyTree

REMEDIES = ("none", "prediction", "spike", "error_feedback", "recipe")
# Remedies that do not depend on a momentum buffer, and so suit every optimizer.
_ANY = tuple(name for name in REMEDIES if name != "spike")

HELP = {
    "learning_rate": "Initial learning rate.",
    "optimizer": "Of every stage: {optimizers}. Muon takes the kernels of hidden layers, Adam the "
    "rest.",
    "adam_learning_rate": "With muon: the initial rate of what Adam takes; learning_rate unless "
    "given.",
    "remedy": f"What is done about late gradients, one of {', '.join(REMEDIES)}. none: nothing, "
    "whatever the flags below say; prediction: forwards at predicted weights; spike: spike "
    "compensation (sgd); error_feedback: see fdg_jax.error_feedback; recipe: fdg_jax.recipes, "
    "which is prediction, for muon with a stretched momentum, for sgd with spike compensation as "
    "well. See docs/guides/closing_the_gap.md; --beta shrinks beside all of them.",
    "prediction_horizon": "How far prediction, error_feedback and recipe look ahead, as a multiple "
    "of a stage's staleness.",
    "momentum_stretch": "By how much a stage's momentum grows with its staleness, 0: not at all. "
    "Unless given it is 0; in the recipe 2 for sgd and 0.3 for muon.",
    "rate_anneal_steps": "Steps in which the rate of a stage grows from 1 / staleness of it, with "
    "muon from 1 / sqrt(staleness), to the full one; 0: it begins with that.",
    "average_decay": "Decay of an exponential moving average of the weights, such as 0.999, with "
    "which the run is evaluated; 0: none. See fdg_jax.average_weights.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedies:
    """The settings of remedies; each field is the flag of that name."""

    adam_learning_rate: float | None = None
    remedy: str = "none"
    prediction_horizon: float = 1.0
    momentum_stretch: float | None = None
    rate_anneal_steps: int = 0
    average_decay: float = 0.0


class Settings(Protocol):
    """The settings of a stage's optimizer, part of every program's settings."""

    @property
    def optimizer(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def adam_learning_rate(self) -> float | None: ...
    @property
    def remedy(self) -> str: ...
    @property
    def prediction_horizon(self) -> float: ...
    @property
    def momentum_stretch(self) -> float | None: ...
    @property
    def rate_anneal_steps(self) -> int: ...
    @property
    def average_decay(self) -> float: ...


def check(settings: Settings, optimizers: tuple[str, ...]) -> None:
    """Raises `UsageError` for the first invalid value."""
    if settings.optimizer not in optimizers:
        raise UsageError(
            f"--optimizer={settings.optimizer}: no such choice; allowed are {', '.join(optimizers)}"
        )
    allowed = REMEDIES if settings.optimizer == "sgd" else _ANY
    if settings.remedy not in allowed:
        raise UsageError(
            f"--remedy={settings.remedy}: no such choice with --optimizer={settings.optimizer}; "
            f"allowed are {', '.join(allowed)}"
        )
    for name in ("prediction_horizon", "momentum_stretch"):
        value = getattr(settings, name)
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"--{name}={value:g}: must be finite, and 0 or more; 1 is usual")
    if settings.adam_learning_rate is not None and not 0 < settings.adam_learning_rate < math.inf:
        raise UsageError(
            f"--adam_learning_rate={settings.adam_learning_rate:g}: must be finite and above 0"
        )
    if not 0 <= settings.average_decay < 1:
        raise UsageError(
            f"--average_decay={settings.average_decay:g}: must be 0 or more and below 1; 0.999 "
            "averages over about 1,000 updates"
        )
    if not 0 <= settings.rate_anneal_steps < 2**31:
        raise UsageError(
            f"--rate_anneal_steps={settings.rate_anneal_steps}: must lie in 0..{2**31 - 1}; 0 "
            "anneals nothing"
        )


def predicts(remedy: str) -> bool:
    """Whether a run's parameters are predictions, different from the true weights."""
    return remedy in ("prediction", "recipe")


def help_texts(optimizers: tuple[str, ...]) -> dict[str, str]:
    """The help text of each flag."""
    named = ", ".join(optimizers)
    return {name: text.replace("{optimizers}", named) for name, text in HELP.items()}


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """Additional arguments of a stage's optimizer.

    Attributes:
      rate: the learning rate by update, without remedy.
      staleness: the staleness of its gradients.
      period: steps per update.
      momentum: momentum of SGD and Muon, and the decay of Adam's first moment.
      weight_decay: L2 in SGD, otherwise decoupled.
      mask: the parameters that decay; None: all. Not for SGD with prediction.
      beta, hops: of shrinking, before SGD, but after AdamW and Muon, which would cancel it.
      exclude: a regular expression for the kernels that Adam optimizes instead of Muon.
      clip_norm: maximal norm of the stage's gradient, or None.
      nesterov: whether SGD's momentum is Nesterov's; not with prediction or spike compensation.
    """

    rate: optax.Schedule
    staleness: Staleness
    period: int
    momentum: float
    weight_decay: float
    beta: float
    hops: int
    mask: Any = None
    exclude: str = ""
    clip_norm: float | None = None
    nesterov: bool = False


def optimizer(settings: Settings, stage: StageSettings) -> optax.GradientTransformation:
    """A stage's optimizer."""
    made = _without_average(settings, stage)
    if not settings.average_decay:
        return made
    return fdg.average_weights(made, settings.average_decay)


def _without_average(settings: Settings, stage: StageSettings) -> optax.GradientTransformation:
    late = fdg.optim.updates_late(stage.staleness)
    stretch, anneal = settings.momentum_stretch, settings.rate_anneal_steps / stage.period or None
    if settings.remedy == "none":
        stretch, anneal = None, None
    if settings.optimizer == "sgd":
        shrink = fdg.fdg_shrink(stage.beta, stage.hops)
        return optax.chain(shrink, _sgd(settings, stage, late, stretch, anneal))
    return _adaptive(settings, stage, late, stretch, anneal)


def _sgd(
    settings: Settings,
    stage: StageSettings,
    late: float,
    stretch: float | None,
    anneal: float | None,
) -> optax.GradientTransformation:
    horizon = settings.prediction_horizon
    rate: Any = stage.rate if anneal is None else fdg.staleness_rate(stage.rate, late, anneal)
    clip = [] if stage.clip_norm is None else [optax.clip_by_global_norm(stage.clip_norm)]
    if settings.remedy == "recipe":
        own: dict[str, Any] = {} if stretch is None else {"stretch": stretch}
        return recipes.sgd(
            stage.rate,
            late,
            stage.momentum,
            stage.weight_decay,
            horizon=horizon,
            anneal_steps=anneal,
            clip_norm=stage.clip_norm,
            **own,
        )
    if settings.remedy == "prediction":
        linear = fdg.delayed_sgd(
            rate, stage.momentum, late, stretch or 0.0, horizon, False, stage.weight_decay
        )
        return optax.chain(*clip, linear)
    momentum, factor = fdg.stretched_momentum(stage.momentum, late, stretch or 0.0)
    if settings.remedy == "spike":
        steps = [
            fdg.scale_by_spike_compensation(momentum, late),
            optax.scale_by_learning_rate(lambda count: factor * rate(count)),
        ]
    else:
        scaled = rate if factor == 1 else lambda count: factor * rate(count)
        steps = [optax.sgd(scaled, momentum=momentum or None, nesterov=stage.nesterov)]
    if settings.remedy == "error_feedback":
        steps.append(fdg.error_feedback(horizon * late))
    return optax.chain(*clip, optax.add_decayed_weights(stage.weight_decay, stage.mask), *steps)


def _adaptive(
    settings: Settings,
    stage: StageSettings,
    late: float,
    stretch: float | None,
    anneal: float | None,
) -> optax.GradientTransformation:
    """AdamW and Muon, each with and without prediction."""
    common: dict[str, Any] = {
        "weight_decay": stage.weight_decay,
        "mask": stage.mask,
        "horizon": settings.prediction_horizon if predicts(settings.remedy) else None,
        "anneal_steps": anneal,
        "clip_norm": stage.clip_norm,
        "scale": stage.beta**stage.hops,
    }
    if settings.optimizer == "adamw":
        b1 = fdg.stretched_momentum(stage.momentum, late, stretch or 0.0).momentum
        found = recipes.adamw(stage.rate, late, b1, **common)
    else:
        adam_rate = None
        if settings.adam_learning_rate is not None:
            share = settings.adam_learning_rate / settings.learning_rate
            adam_rate = lambda count: share * stage.rate(count)  # noqa: E731
        own = {} if stretch is None and settings.remedy == "recipe" else {"stretch": stretch or 0.0}
        found = recipes.muon(
            stage.rate,
            late,
            stage.momentum,
            exclude=stage.exclude,
            adam_learning_rate=adam_rate,
            **own,
            **common,
        )
    if settings.remedy == "error_feedback":
        feedback = fdg.error_feedback(settings.prediction_horizon * late)
        found = optax.chain(found, feedback)
    return found


def kernels(params: PyTree) -> PyTree:
    """True for kernels of layers, False for biases, scales and embeddings."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )
