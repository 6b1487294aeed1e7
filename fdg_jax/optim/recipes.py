"""The optimizer of a stage, tuned for late gradients: one call each for SGD, AdamW and Muon.

For ``Pipeline(stages, loss_fn, lambda k: recipes.sgd(0.1, (rule, k)), rule)``, best with
``rule = schedule.fdg(K, order="backward_first")``, which has one update less of staleness for
nothing. With staleness 0 each is the plain optimizer that it is named after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from fdg_jax.optim.momentum import delayed_sgd
from fdg_jax.optim.muon import muon_dimension_numbers
from fdg_jax.optim.prediction import predict_weights
from fdg_jax.optim.rate import staleness_rate
from fdg_jax.optim.staleness import Staleness, updates_late


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
    late = updates_late(staleness)
    rate = learning_rate
    if anneal_steps is not None:
        rate = staleness_rate(rate, late, anneal_steps)
    inner = delayed_sgd(rate, momentum, late, stretch, horizon, spike, weight_decay)
    return _clipped(inner, clip_norm)


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
) -> optax.GradientTransformation:
    late = updates_late(staleness)
    rate = learning_rate
    if anneal_steps is not None:
        rate = staleness_rate(rate, late, anneal_steps)
    inner = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)
    return _predicted(_clipped(inner, clip_norm), late, horizon)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    staleness: Staleness,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    exclude: str = "",
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    horizon: float | None = 1.0,
    anneal_steps: float | None = None,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    late = updates_late(staleness)
    rates = [learning_rate, adam_learning_rate]
    if anneal_steps is not None:
        rates = [r if r is None else staleness_rate(r, late, anneal_steps, 0.5) for r in rates]
    inner = optax.contrib.muon(
        rates[0],
        beta=momentum,
        weight_decay=weight_decay,
        weight_decay_mask=mask,
        adam_b1=momentum,
        adam_b2=0.95,
        adam_weight_decay=weight_decay,
        adam_learning_rate=rates[1],
        muon_weight_dimension_numbers=muon_dimension_numbers(exclude=exclude),
    )
    return _predicted(_clipped(inner, clip_norm), late, horizon)


def _clipped(
    inner: optax.GradientTransformation, norm: float | None
) -> optax.GradientTransformation:
    return inner if norm is None else optax.chain(optax.clip_by_global_norm(norm), inner)


def _predicted(
    inner: optax.GradientTransformation, late: float, horizon: float | None
) -> optax.GradientTransformation:
    return inner if horizon is None else predict_weights(inner, late, "last_update", horizon)
