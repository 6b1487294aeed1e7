"""Optimizers tuned for stale gradients: one call each for SGD, AdamW and Muon.

Usage: ``Pipeline(stages, loss_fn, lambda k: recipes.sgd(0.1, (rule, k)), rule)``, preferably with
``rule = schedule.fdg(K, order="backward_first")``, which reduces staleness by one update. With
staleness 0 each recipe equals the plain optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from fdg_jax.optim.momentum import delayed_sgd, stretched_momentum
from fdg_jax.optim.muon import muon_dimension_numbers
from fdg_jax.optim.prediction import predict_weights
from fdg_jax.optim.rate import staleness_rate
from fdg_jax.optim.staleness import Staleness, checked_number, updates_late


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    staleness: Staleness,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    stretch: float = 2.0,
    horizon: float = 1.0,
    spike: bool = True,
    anneal_steps: float | None = None,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """SGD for stale gradients: `delayed_sgd` and an optional warm-up from 1 / d.

    The chain of a stage: optional clipping by the stage's norm; linear prediction, momentum
    stretched by 2, spike compensation, L2 decay at the true weights; the learning rate of
    `fdg_jax.staleness_rate`. Place shrinking (`fdg_jax.fdg_shrink`) before it.

    Results on a fifth of CIFAR-10 (JPEG), 1,500 steps (EXPERIMENTS.md): K = 4, learning rate 0.4,
    annealed over 750 steps: test error 32.0 %; back-propagation with learning rate 0.4 30.9 %,
    plain FDG 38.0 %. K = 2, learning rate 0.4, stretch 0.5: 31.5 %, plain FDG 32.8 %.

    Args:
      learning_rate: a number or a schedule of the stage's updates; one to two times that of
        back-propagation.
      staleness: updates between the forward and the application of a gradient, or ``(schedule,
        k)``.
      momentum: as for back-propagation, in [0, 1).
      weight_decay: added to the gradient at the true weights (L2), >= 0.
      stretch: the relative increase of the response time per update of delay, >= 0.
      horizon: the prediction horizon as a multiple of the staleness, >= 0.
      spike: whether to use spike compensation.
      anneal_steps: the number of updates until the full learning rate (`fdg_jax.staleness_rate`),
        for example half of a short run. None: no annealing.
      clip_norm: the stage's share of the maximal gradient norm, or None.

    Returns:
      A transformation for the stage. With staleness 0 it is bitwise identical to ``optax.sgd`` with
      weight decay.

    Raises:
      ValueError: a number out of bounds.

    Example:
      >>> from fdg_jax import recipes, schedule
      >>> rule = schedule.fdg(4, order="backward_first")
      >>> def optimizer(k):
      ...     return recipes.sgd(0.2, (rule, k), weight_decay=5e-4, anneal_steps=750)
    """
    late = updates_late(staleness)
    rate = learning_rate
    if anneal_steps is not None:
        rate = staleness_rate(rate, late, anneal_steps)
    inner = delayed_sgd(rate, momentum, late, stretch, horizon, spike, weight_decay)
    return _chain(inner, clip_norm)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    staleness: Staleness,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    horizon: float | None = 1.0,
    anneal_steps: float | None = None,
    clip_norm: float | None = None,
    scale: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW for stale gradients: weight prediction and an optional warm-up from 1 / d.

    The chain of a stage: optional clipping by the stage's norm; AdamW; ``scale``; wrapped by
    prediction from the last update, ``horizon`` times the staleness ahead.

    Results on text, 1,000 steps, K = 4 (EXPERIMENTS.md): no better than AdamW with b1 = 0.5 without
    prediction, and 25 % above back-propagation. Prefer Muon if possible.

    Args:
      learning_rate: a number, or a schedule of the stage's updates.
      staleness: updates between forward and use of a gradient, or ``(schedule, k)``.
      b1, b2: decay of the moments, in [0, 1).
      weight_decay: decoupled, at the true weights, >= 0.
      mask: the parameters that decay, as in `optax.adamw`.
      horizon: the prediction horizon as a multiple of the staleness; None: no prediction and no
        buffer.
      anneal_steps: the stage's updates until the full rate (`staleness_rate`), or None.
      clip_norm: the stage's share of the maximal gradient norm, or None.
      scale: factor on the stage's updates in (0, 1]: shrinking, ``beta ** hops``, for optimizers
        that cancel a factor on the gradient.

    Returns:
      A transformation for the stage. With staleness 0 it is bitwise identical to ``optax.adamw``.

    Raises:
      ValueError: a number out of bounds.

    Example:
      >>> from fdg_jax import recipes, schedule
      >>> rule = schedule.fdg(4, order="backward_first")
      >>> def optimizer(k):
      ...     return recipes.adamw(1e-3, (rule, k), b1=0.95)
    """
    late = updates_late(staleness)
    _check(b1=b1, b2=b2, weight_decay=weight_decay)
    rate = learning_rate
    if anneal_steps is not None:
        rate = staleness_rate(rate, late, anneal_steps)
    inner = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)
    return _predicted(_chain(inner, clip_norm, scale), late, horizon)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    staleness: Staleness,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    exclude: str = "",
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    stretch: float = 0.3,
    horizon: float | None = 1.0,
    anneal_steps: float | None = None,
    clip_norm: float | None = None,
    scale: float = 1.0,
) -> optax.GradientTransformation:
    """Muon for stale gradients: weight prediction and an optional warm-up from 1 / sqrt(d).

    The chain of a stage: optional clipping by the stage's norm; ``optax.contrib.muon`` for kernels
    (`muon_dimension_numbers`) and ``optax.nadamw`` for the rest, both with stretched momentum;
    ``scale``; wrapped by prediction from the last update, ``horizon`` times the staleness ahead.

    Results on a fifth of CIFAR-10 (JPEG), 1,500 steps: test error 25.3 % with K = 4 and rate 0.08,
    equal to back-propagation with Muon; back-propagation with SGD 30.9 %. On text, 1,000 steps,
    K = 4, stretch 1: loss 2.12, back-propagation 1.79, without prediction 2.23; in 4,000 steps 1.68
    and 1.67 (EXPERIMENTS.md).

    Args:
      learning_rate: rate of the kernels; a number, or a schedule of the stage's updates.
      staleness: updates between forward and use of a gradient, or ``(schedule, k)``.
      momentum: Muon's momentum and the decay of Adam's first moment, in [0, 1), before stretching.
      weight_decay: decoupled, at the true weights, >= 0.
      mask: the parameters that decay, as in `optax.adamw`.
      exclude: a regular expression, searched in the paths of kernels; Adam optimizes the matching
        ones, usually the last layer.
      adam_learning_rate: rate of the arrays that Adam optimizes; None: ``learning_rate``. A tenth
        to a fifth of it is a good start.
      stretch: the relative increase of the response time per update of delay, >= 0. The rate is
        unchanged, because the steps of Muon and Adam, unlike SGD's, do not grow with momentum.
      horizon: the prediction horizon as a multiple of the staleness; None: no prediction and no
        buffer.
      anneal_steps: the stage's updates until both full rates (`staleness_rate`, power 0.5), or
        None.
      clip_norm: the stage's share of the maximal gradient norm, or None.
      scale: factor on the stage's updates in (0, 1]: shrinking, ``beta ** hops``, for optimizers
        that cancel a factor on the gradient.

    Returns:
      A transformation for the stage. With staleness 0 it is bitwise identical to
      ``optax.contrib.muon``.

    Raises:
      ValueError: a number out of bounds.

    Example:
      >>> from fdg_jax import recipes, schedule
      >>> rule = schedule.fdg(4, order="backward_first")
      >>> def optimizer(k):
      ...     return recipes.muon(0.02, (rule, k), adam_learning_rate=2e-3, exclude="logits")
    """
    late = updates_late(staleness)
    _check(weight_decay=weight_decay)
    beta = stretched_momentum(momentum, late, stretch).momentum
    rates = [learning_rate, learning_rate if adam_learning_rate is None else adam_learning_rate]
    if anneal_steps is not None:
        rates = [staleness_rate(rate, late, anneal_steps, power=0.5) for rate in rates]
    numbers = muon_dimension_numbers(exclude=exclude)
    decay = {"weight_decay": weight_decay}
    inner = optax.partition(
        {
            "muon": optax.contrib.muon(
                rates[0],
                beta=beta,
                weight_decay_mask=mask,
                muon_weight_dimension_numbers=numbers,
                **decay,
            ),
            # Separate, since the Adam inside optax's muon takes no mask.
            "adam": optax.nadamw(rates[1], b1=beta, b2=0.95, mask=mask, **decay),
        },
        lambda params: jax.tree.map(
            lambda n: "adam" if n is None else "muon",
            numbers(params),
            is_leaf=lambda n: n is None or isinstance(n, MuonDimensionNumbers),
        ),
    )
    return _predicted(_chain(inner, clip_norm, scale), late, horizon)


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        most = math.inf if name == "weight_decay" else 1
        checked_number(name, value, 0, most, "0.9 is usual" if most == 1 else "0 switches it off")


def _chain(
    inner: optax.GradientTransformation, clip_norm: float | None, scale: float = 1.0
) -> optax.GradientTransformation:
    parts = [inner]
    if clip_norm is not None:
        checked_number("clip_norm", clip_norm, math.ulp(0.0), math.inf, "None does not clip")
        parts.insert(0, optax.clip_by_global_norm(clip_norm))
    if scale != 1:
        checked_number("scale", scale, math.ulp(0.0), 1, "1 does not shrink")
        parts.append(optax.scale(scale))
    return optax.chain(*parts) if len(parts) > 1 else inner


def _predicted(
    inner: optax.GradientTransformation, late: float, horizon: float | None
) -> optax.GradientTransformation:
    return inner if horizon is None else predict_weights(inner, late, "last_update", horizon)
