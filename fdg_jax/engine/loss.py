"""The loss of a mini-batch from those of its micro-batches: a mean, or a weighted sum.

loss_fn returns              loss of a mini-batch of M parts      its gradient
mean, metrics                1/M sum_m mean_m                     1/M sum_m grad mean_m
(sum, weight), metrics       sum_m sum_m / sum_m weight_m         sum_m grad sum_m / sum_m weight_m
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from fdg_jax.layer_check import shapes
from fdg_jax.schedule import Schedule
from fdg_jax.typing import LossFn, LossOfPart, PyTree

if TYPE_CHECKING:
    from fdg_jax.engine.stage import Stage


class LossError(ValueError):
    """A loss function failed or returned an invalid value."""


class Weighted(NamedTuple):
    """The auxiliary output of the loss of a micro-batch.

    Attributes:
      weight: the sum of the weights of all parts divides the sum of their losses.
      metrics: means over what the weight counts.
    """

    weight: jax.Array
    metrics: dict[str, Any]


def loss_of_part(loss_fn: LossFn, parts: int) -> LossOfPart:
    """Normalises a loss function for one micro-batch; the differentiated value comes first.

    Args:
      loss_fn: returns ``(mean, metrics)`` or ``((sum, weight), metrics)``.
      parts: the number of micro-batches per mini-batch.

    Returns:
      A function that returns (sum, `Weighted`) if a mini-batch is divided and there is a weight,
      otherwise (mean, metrics). A weight has no gradient.

    Raises:
      LossError: (from the function) the loss function fails, or returns anything else.

    Example:
      >>> loss = loss_of_part(lambda y, t: ((y.sum(), (y > 0).sum()), {}), 1)
      >>> float(loss(jnp.array([3.0, 1.0, 0.0]), None)[0])
      2.0
    """

    @functools.wraps(loss_fn)
    def loss(outputs: PyTree, labels: PyTree) -> Any:
        try:
            found: Any = loss_fn(outputs, labels)
        except Exception as error:
            raise LossError(
                f"loss_fn: fails on outputs {shapes(outputs)} and labels {shapes(labels)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not _is_valid(found):
            raise LossError(
                f"loss_fn: returns {shapes(found)}, but must return the mean loss (a scalar), or "
                "(sum, weight) (two scalars), and a dict of metrics: return loss, {}"
            )
        if not _is_pair(found[0]):
            return found
        (total, weight), metrics = found
        total = jnp.asarray(total)
        weight = jax.lax.stop_gradient(jnp.asarray(weight).astype(total.dtype))
        if parts > 1:
            return total, Weighted(weight, metrics)
        return total / _divisor(weight), metrics

    return loss


def average(
    reports: Sequence[tuple[jax.Array, Any]],
) -> tuple[tuple[jax.Array, dict[str, Any]], jax.Array | None]:
    """Loss and metrics of a mini-batch, and the divisor of its gradient.

    Args:
      reports: the result of the function from `loss_of_part` for each part.

    Returns:
      Loss and metrics, and the total weight of the parts with a finite loss; None without weights.
      A total of 0 counts as 1.

    Example:
      >>> (loss, metrics), weight = average([(6.0, Weighted(2.0, {})), (0.0, Weighted(1.0, {}))])
      >>> float(loss), float(weight)
      (2.0, 3.0)
    """
    if not isinstance(reports[0][1], Weighted):
        means: Any = jax.tree.map(lambda *v: sum(v) / len(v), *reports)
        return means, None
    totals = jnp.stack([total for total, _ in reports])
    weights = jnp.stack([own.weight for _, own in reports])
    shares = weights / _divisor(weights.sum())

    def mean(*values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(shares == 0, 0, shares * jnp.stack(values)))

    metrics = jax.tree.map(mean, *[own.metrics for _, own in reports])
    held = jnp.where(jnp.isfinite(totals), weights, 0).sum()
    return (totals.sum() / _divisor(weights.sum()), metrics), _divisor(held)


def check_weighted(stages: Sequence[Stage], schedule: Schedule) -> None:
    """Rejects ``(sum, weight)`` if an update does not cover exactly one mini-batch.

    Args:
      stages: the pipeline's stages.
      schedule: its schedule.

    Raises:
      ValueError: an update covers parts of several mini-batches, or each gradient is corrected
        separately.
    """
    if any(counts.pending or counts.slots["flight"] for counts in schedule.counts):
        raise ValueError(
            f"loss_fn: returns (sum, weight), but schedule {schedule.name} keeps micro-batches in "
            "flight between mini-batches; return the mean"
        )
    for k, stage in enumerate(stages):
        if stage.optimizer.per_gradient is not None:
            raise ValueError(
                f"loss_fn: returns (sum, weight), but the optimizer of stage {k} corrects each "
                "gradient (per_gradient), which would be that of a sum; return the mean, or leave "
                "per_gradient out: nothing is stale here"
            )


def _is_valid(found: Any) -> bool:
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        return False
    numbers = found[0] if _is_pair(found[0]) else [found[0]]
    return all(isinstance(v, int | float) or getattr(v, "shape", None) == () for v in numbers)


def _is_pair(loss: Any) -> bool:
    return isinstance(loss, tuple | list) and len(loss) == 2


def _divisor(weight: jax.Array) -> jax.Array:
    return jnp.where(weight == 0, 1, weight)
