"""SGD with momentum adapted to stale gradients: stretched, compensated, predicted."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.optim.prediction import DelayedSGDState, true_params
from fdg_jax.optim.staleness import Staleness, checked_number, updates_late


class Stretched(NamedTuple):
    """The result of `stretched_momentum`.

    Attributes:
      momentum: the stage's momentum.
      rate_factor: factor on the stage's learning rate.
    """

    momentum: float
    rate_factor: float


def stretched_momentum(momentum: float, staleness: Staleness, stretch: float = 0.5) -> Stretched:
    r"""A longer momentum for a stage with stale gradients, with the same total response.

    .. math::
        1 - m_k = \frac{1 - m}{1 + c d}, \qquad \eta_k = \eta \, \frac{1 - m_k}{1 - m}

    The total response to a gradient stays :math:`\eta / (1 - m)`, but its duration grows with the
    delay. Alone it has little effect; with prediction it raises the largest stable rate: on a
    quadratic with d = 6 and fixed :math:`\eta / (1 - m)`, from 0.0286 (m = 0.9) to 0.0669
    (m = 0.98). Shrinking and clipping act on the gradient before it. Memory: none.

    Args:
      momentum: m, that of back-propagation, in [0, 1).
      staleness: d, updates between forward and use of a gradient, or ``(schedule, k)``.
      stretch: c >= 0, the relative increase of the response time per update of delay.

    Returns:
      The stage's momentum and the factor on its learning rate, `Stretched`.

    Raises:
      ValueError: a number out of bounds.

    Example:
      >>> [round(stretched_momentum(0.9, d).momentum, 3) for d in (6, 4, 2, 0)]
      [0.975, 0.967, 0.95, 0.9]

    References:
      This project; AsyncPP (Ajanthan et al., `Nesterov Method for Asynchronous Pipeline Parallel
      Optimization <https://arxiv.org/abs/2505.01099>`_, 2025) raises the momentum of early stages
      for the same reason.
    """
    m = checked_number("momentum", momentum, 0, 1, "0.9 is usual")
    c = checked_number("stretch", stretch, 0, math.inf, "0 does not stretch")
    late = c * updates_late(staleness)
    if not late:
        return Stretched(m, 1.0)
    return Stretched(1 - (1 - m) / (1 + late), 1 / (1 + late))


def scale_by_spike_compensation(
    momentum: float, staleness: Staleness
) -> optax.GradientTransformation:
    r"""Momentum that immediately applies the response a stale gradient has missed.

    .. math::
        v \leftarrow m v + g, \qquad u = a v + b g, \qquad
        a = m^d, \quad b = \frac{1 - m^d}{1 - m}

    Replaces `optax.trace`, before the learning rate. A gradient that is d updates late has missed d
    steps of its momentum's geometric series; b g makes up for them, and a v continues the series.
    The total response stays :math:`1 / (1 - m)`. d = 1 is Nesterov's momentum. It helps SGD with
    momentum, alone or with prediction; with noisy gradients its cost equals its gain. Shrinking and
    clipping go before it. Memory: the momentum buffer only.

    Args:
      momentum: m in [0, 1).
      staleness: d, updates between forward and use of a gradient, or ``(schedule, k)``.

    Returns:
      A transformation. With staleness 0 it is bitwise identical to ``optax.trace(momentum)``.

    Raises:
      ValueError: a number out of bounds.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(scale_by_spike_compensation(0.9, staleness=6), optax.scale(-0.1))
      >>> params = jnp.ones(())
      >>> updates, _ = optimizer.update(jnp.ones(()), optimizer.init(params), params)
      >>> round(float(updates), 6)  # of -1 in all
      -0.521703

    References:
      Kosson et al., `Pipelined Backpropagation at Scale <https://arxiv.org/abs/2003.11666>`_, 2020.
    """
    m = checked_number("momentum", momentum, 0, 1, "0.9 is usual")
    late = updates_late(staleness)

    def init(params: optax.Params) -> optax.TraceState:
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: optax.TraceState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.TraceState]:
        del params
        trace = jax.tree.map(lambda g, v: g + m * v, updates, state.trace)
        return _compensated(updates, trace, m, late), optax.TraceState(trace)

    return optax.GradientTransformation(init, update)


def delayed_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    staleness: Staleness,
    stretch: float = 0.5,
    horizon: float = 1.0,
    spike: bool = True,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    r"""SGD for stale gradients: weight prediction, stretched momentum, spike compensation.

    .. math::
        g' &= f_k (g + \lambda w), \qquad v' = m_k v + g' \\
        w' &= w - \eta (a v' + b g'), \qquad a = m_k^d, \quad b = \frac{1 - m_k^d}{1 - m_k} \\
        p' &= w' - \eta^+ h d \, v'

    with the momentum :math:`m_k` and the factor :math:`f_k` of `stretched_momentum`, and
    :math:`\eta^+` the rate of the next update (of this one, if `optax.inject_hyperparams` has the
    schedule). The parameters are p, the linear prediction of the weights h d updates ahead; w is
    `true_params`. Without ``stretch`` and ``spike`` it is linear weight prediction; with
    ``horizon=0`` as well it is `optax.sgd`.

    It is a whole optimizer: shrinking and clipping go before it, nothing after it. It helps at
    every K, and most with `staleness_rate` and a larger rate than plain FDG tolerates
    (`recipes.sgd`). Memory: as SGD with momentum, since the prediction follows from its buffer.

    Args:
      learning_rate: a number, or a schedule of the stage's updates; start with that of
        back-propagation.
      momentum: m in [0, 1), that of back-propagation.
      staleness: d, updates between forward and use of a gradient, or ``(schedule, k)``.
      stretch: c of `stretched_momentum`, >= 0.
      horizon: h, the prediction horizon as a multiple of the staleness, >= 0.
      spike: whether to use spike compensation; otherwise a = 1, b = 0.
      weight_decay: added to the gradient at the true weights (L2), >= 0.

    Returns:
      A transformation for the stage. With staleness 0 it is bitwise identical to ``optax.sgd``
      after ``optax.add_decayed_weights``.

    Raises:
      ValueError: a number out of bounds.

    Example:
      >>> import optax
      >>> from fdg_jax import schedule
      >>> rule = schedule.fdg(4, order="backward_first")
      >>> def optimizer(k):  # for Pipeline(stages, loss_fn, optimizer, rule)
      ...     return delayed_sgd(0.1, 0.9, (rule, k), weight_decay=5e-4)

    References:
      Kosson et al., `Pipelined Backpropagation at Scale <https://arxiv.org/abs/2003.11666>`_, 2020,
      for linear weight prediction and spike compensation; their use with a stretched momentum, in
      one buffer, is this project's.
    """
    late = updates_late(staleness)
    m, factor = stretched_momentum(momentum, late, stretch)
    steps = checked_number("horizon", horizon, 0, math.inf, "1 is usual") * late
    decay = checked_number("weight_decay", weight_decay, 0, math.inf, "0 switches it off")

    def rate(count: jax.Array) -> jax.Array | float:
        return learning_rate(count) if callable(learning_rate) else learning_rate

    def init(params: optax.Params) -> DelayedSGDState:
        trace = jax.tree.map(jnp.zeros_like, params)
        ahead = jnp.zeros((), jnp.result_type(float))
        return DelayedSGDState(jnp.zeros((), jnp.int32), trace, ahead)

    def update(
        updates: optax.Updates, state: DelayedSGDState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, DelayedSGDState]:
        if decay:
            if params is None:
                raise ValueError("params: weight decay needs update(grads, state, params)")
            w = true_params(params, state) if steps else params
            updates = jax.tree.map(lambda g, p: g + decay * p, updates, w)
        if factor != 1:
            updates = jax.tree.map(lambda g: factor * g, updates)
        trace = jax.tree.map(lambda g, v: g + m * v, updates, state.trace)
        updates = _compensated(updates, trace, m, late if spike else 0.0)
        step = -1 * rate(state.count)
        updates = jax.tree.map(lambda u: _cast(step, u) * u, updates)
        count, ahead = optax.safe_increment(state.count), state.ahead
        if steps:
            ahead = jnp.asarray(rate(count) * steps, ahead.dtype)
            updates = jax.tree.map(
                lambda u, v, old: u + (_cast(state.ahead, old) * old - _cast(ahead, v) * v),
                updates,
                trace,
                state.trace,
            )
        return updates, DelayedSGDState(count, trace, ahead)

    return optax.GradientTransformation(init, update)


def _compensated(
    gradient: optax.Updates, trace: optax.Updates, m: float, late: float
) -> optax.Updates:
    """a v + b g, for a momentum buffer that already contains g."""
    if not late:
        return trace
    a, b = m**late, (1 - m**late) / (1 - m)
    return jax.tree.map(lambda g, v: a * v + b * g, gradient, trace)


def _cast(factor: jax.Array | float, like: jax.Array) -> jax.Array:
    return jnp.asarray(factor, like.dtype)
