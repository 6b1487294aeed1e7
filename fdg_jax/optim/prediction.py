r"""Weight prediction: runs forwards at predicted weights of the time the gradient is applied.

A gradient applied d updates after its forward should be computed at the weights of that time. The
papers keep two versions, :math:`w` and its prediction :math:`p = w + \varphi(s)`, where the
displacement :math:`\varphi` is computed from the optimizer's state s. Here the parameters *are* p,
and w is derived:

.. math::
    w = p - \varphi(s), \qquad (u, s') = \mathrm{inner}(g, s, w), \qquad
    p' = p + u + \varphi(s') - \varphi(s)

which gives the same p and w with only an optax transformation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.optim.displacement import Displacement, states_of
from fdg_jax.optim.staleness import Staleness, checked_number, updates_late
from fdg_jax.optim.transformation import transformation


class PredictionState(NamedTuple):
    """State of `predict_weights`.

    Attributes:
      inner: state of the optimizer.
      displacement: predicted minus true weights.
    """

    inner: optax.OptState
    displacement: optax.Updates


class DelayedSGDState(NamedTuple):
    """State of `delayed_sgd`; predicted minus true weights is ``-ahead * trace``.

    Attributes:
      count: number of updates so far, int32.
      trace: the momentum buffer.
      ahead: rate of the next update times the updates ahead.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name for it
    trace: optax.Updates
    ahead: jax.Array


def predict_weights(
    optimizer: optax.GradientTransformation,
    staleness: Staleness,
    displacement: Literal["last_update", "momentum"] | Displacement = "last_update",
    horizon: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes the parameters a prediction of the weights at which the gradient will be applied.

    .. math::
        p = w + \varphi_{hd}(s), \qquad w' = w + u, \qquad p' = p + u + \varphi(s') - \varphi(s)

    The optimizer sees the true weights w, so weight decay acts on them. Its displacement
    :math:`\varphi_n`, n = horizon * staleness updates ahead, is one of

    - ``"last_update"``: :math:`n u`, the last update n times. For any optimizer.
    - ``"momentum"``: the change by n updates with zero gradient, at the rates of these future
      updates. For SGD with momentum m that is :math:`-\eta v (m - m^{n+1}) / (1 - m)`, plus the
      decay of these updates with L2 decay before it. It runs the optimizer n times; for
      non-integer n the last update is multiplied by the fraction.
    - a function ``f(opt_state, true_params, n)`` that returns it, such as `adam_displacement`.

    It must wrap the *whole* optimizer of a stage, including clipping, shrinking and decay:
    transformations chained after it would change the updates but not the prediction, and so the
    true weights. `optax.MultiSteps` goes outside. It helps if updates keep their direction: with
    momentum >= 0.9, and most with stretched momentum (`stretched_momentum`) or Muon. Memory: one
    copy of the parameters, even if the staleness is 0; `delayed_sgd` needs none. Evaluate and
    export at `true_params`, as `fdg_jax.Pipeline.predict` does.

    Args:
      optimizer: any optax transformation whose result is added to the parameters.
      staleness: updates between forward and use of a gradient, >= 0, or ``(schedule, k)``.
      displacement: as above.
      horizon: the prediction horizon as a multiple of the staleness, >= 0. Dimensionless.

    Returns:
      A transformation for the stage. With staleness 0 it is bitwise identical to the optimizer.

    Raises:
      ValueError: an invalid argument.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = predict_weights(optax.sgd(0.1), staleness=2)
      >>> params = jnp.ones(())
      >>> updates, state = optimizer.update(jnp.ones(()), optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(round(float(params), 6), round(float(true_params(params, state)), 6))
      0.7 0.9

    References:
      Chen et al., `SpecTrain <https://arxiv.org/abs/1809.02839>`_, 2018; Kosson et al.,
      `Pipelined Backpropagation at Scale <https://arxiv.org/abs/2003.11666>`_, 2020 (linear weight
      prediction). ``"momentum"`` is FTPipe's msnag, and with decay its aggmsnag without
      accumulation; Eliad et al., USENIX ATC 2021. That the parameters are the prediction is this
      project's form of it.
    """
    steps = updates_late(staleness) * checked_number(
        "horizon", horizon, 0, math.inf, "1 looks as far ahead as the gradient is late"
    )
    inner = transformation(optimizer)
    ahead = _displacement(displacement, inner)

    def init(params: optax.Params) -> PredictionState:
        return PredictionState(inner.init(params), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates,
        state: PredictionState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PredictionState]:
        if not steps:
            updates, new = inner.update(updates, state.inner, params, **extra_args)
            return updates, PredictionState(new, state.displacement)
        if params is None:
            raise ValueError("params: prediction needs update(grads, state, params)")
        before = state.displacement
        w = jax.tree.map(jnp.subtract, params, before)
        updates, new = inner.update(updates, state.inner, w, **extra_args)
        after = ahead(updates, new, w, steps, extra_args)
        after = jax.tree.map(lambda a, b: a.astype(b.dtype), after, before)
        updates = jax.tree.map(lambda u, a, b: u + (a - b).astype(u.dtype), updates, after, before)
        return updates, PredictionState(new, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _displacement(
    named: Any, inner: optax.GradientTransformationExtraArgs
) -> Callable[..., optax.Updates]:
    """The displacement after an update, as a function of the update, the new state, the old
    weights, the updates ahead and the extra arguments."""

    def last_update(
        u: optax.Updates, state: optax.OptState, w: optax.Params, n: float, extra_args: Any
    ) -> optax.Updates:
        del state, w, extra_args
        return jax.tree.map(lambda leaf: jnp.asarray(n, leaf.dtype) * leaf, u)

    def without_gradient(
        u: optax.Updates, state: optax.OptState, w: optax.Params, n: float, extra_args: Any
    ) -> optax.Updates:
        start = optax.apply_updates(w, u)
        zero = jax.tree.map(jnp.zeros_like, u)

        def one(carry: Any, share: float = 1.0) -> Any:
            at, state = carry
            step, state = inner.update(zero, state, at, **extra_args)
            step = jax.tree.map(lambda s: jnp.asarray(share, s.dtype) * s, step)
            return optax.apply_updates(at, step), state

        whole = math.floor(n)
        carry = jax.lax.fori_loop(0, whole, lambda _, c: one(c), (start, state))
        if n > whole:
            carry = one(carry, n - whole)
        return jax.tree.map(jnp.subtract, carry[0], start)

    def own(
        u: optax.Updates, state: optax.OptState, w: optax.Params, n: float, extra_args: Any
    ) -> optax.Updates:
        del extra_args
        return named(state, optax.apply_updates(w, u), n)

    if named == "last_update":
        return last_update
    if named == "momentum":
        return without_gradient
    if not callable(named):
        raise ValueError(
            f"displacement={named!r}: allowed are 'last_update', 'momentum', and a function of "
            "(opt_state, true_params, updates ahead)"
        )
    return own


def true_params(params: optax.Params, opt_state: optax.OptState) -> optax.Params:
    r"""The true weights of predicted parameters: :math:`w = p - \varphi(s)`.

    For evaluation, export, and any other use of a trained model. If the next rate is zero, the
    displacement of `delayed_sgd` and ``"momentum"`` is zero, and both coincide.

    Args:
      params: parameters trained with this optimizer.
      opt_state: the optimizer's state; without prediction the parameters stay unchanged.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: ``params`` contain an optimizer's state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from fdg_jax import delayed_sgd
      >>> optimizer = delayed_sgd(0.1, 0.9, staleness=2, stretch=0, spike=False)
      >>> params = jnp.ones(())
      >>> updates, state = optimizer.update(jnp.ones(()), optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(round(float(params), 6), round(float(true_params(params, state)), 6))
      0.7 0.9

    References:
      Compare `optax.contrib.schedule_free_eval_params`.
    """
    if states_of(params, (PredictionState, DelayedSGDState)):
        raise ValueError(
            "params: hold an optimizer's state; the order is true_params(params, opt_state)"
        )
    for state in states_of(opt_state, (PredictionState, DelayedSGDState)):
        params = _minus(_ahead_of(state), params)
    return params


def without_prediction(
    params: optax.Params, opt_state: optax.OptState
) -> tuple[optax.Params, optax.OptState]:
    """The true weights, and a state that restarts the prediction.

    For a change of K or of the schedule, which change the prediction horizon of a stage. Momentum
    buffers stay unchanged; that of `delayed_sgd` does not depend on its stretch.

    Args:
      params: as in `true_params`.
      opt_state: as in `true_params`.

    Returns:
      True weights, and the state with a displacement of zero; moments and counts stay.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = predict_weights(optax.sgd(0.1), staleness=2)
      >>> state = optimizer.init(jnp.ones(()))._replace(displacement=jnp.full((), 0.5))
      >>> params, state = without_prediction(jnp.ones(()), state)
      >>> float(params), float(state.displacement)
      (0.5, 0.0)
    """

    def begin(state: Any) -> Any:
        if isinstance(state, PredictionState):
            return state._replace(displacement=jax.tree.map(jnp.zeros_like, state.displacement))
        if isinstance(state, DelayedSGDState):
            return state._replace(ahead=jnp.zeros_like(state.ahead))
        return state

    predicts = (PredictionState, DelayedSGDState)
    anew = jax.tree.map(begin, opt_state, is_leaf=lambda node: isinstance(node, predicts))
    return true_params(params, opt_state), anew


def _ahead_of(state: PredictionState | DelayedSGDState) -> optax.Updates:
    if isinstance(state, PredictionState):
        return state.displacement
    return jax.tree.map(lambda v: -jnp.asarray(state.ahead, v.dtype) * v, state.trace)


def _minus(displacement: optax.Updates, params: optax.Params) -> optax.Params:
    """Subtracts a displacement, except for parameters masked by `optax.partition`."""

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(
        lambda phi, p: p if masked(phi) else p - phi.astype(p.dtype),
        displacement,
        params,
        is_leaf=masked,
    )
