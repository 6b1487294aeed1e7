"""Displacements: the predicted movement of the weights, from an optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# (state of the optimizer, true weights, updates ahead) -> displacement of the true weights
Displacement = Callable[[optax.OptState, optax.Params, float], optax.Updates]


def adam_displacement(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> Displacement:
    r"""The displacement of Adam and AdamW with a constant second moment.

    .. math::
        p \leftarrow (1 - \eta_i \lambda) p - \frac{\eta_i}{1 - b_1^{t+i}}
        \frac{b_1^i m}{\sqrt{v / (1 - b_2^{t+i})} + \epsilon}, \qquad i = 1 .. n

    after t updates, from p = w. With ``predict_weights(..., "momentum")`` the second moment decays
    as well. The arguments are those of `optax.adamw`, whose state is read.

    Args:
      learning_rate: a number, or a schedule of the stage's updates.
      b1, b2, eps: as in the optimizer. Dimensionless.
      weight_decay: decoupled; 0 for Adam.
      mask: the parameters that decay, as in `optax.adamw`.

    Returns:
      A displacement for `predict_weights`; for a fraction of an update, its rate is multiplied by
      that fraction.

    Example:
      >>> import optax
      >>> from fdg_jax import predict_weights
      >>> inner = optax.adamw(1e-3, b1=0.95, weight_decay=0.1)
      >>> ahead = adam_displacement(1e-3, b1=0.95, weight_decay=0.1)
      >>> optimizer = predict_weights(inner, staleness=6, displacement=ahead)

    References:
      Eliad et al., FTPipe, USENIX ATC 2021, its weight prediction for Adam.
    """

    def ahead(state: optax.OptState, params: optax.Params, n: float) -> optax.Updates:
        found = states_of(state, optax.ScaleByAdamState)
        if len(found) != 1:
            raise ValueError(
                f"displacement: the optimizer's state has {len(found)} states of Adam, not one; "
                "adam_displacement is for optax.adam and optax.adamw"
            )
        (adam,) = found
        decays = mask(params) if callable(mask) else mask
        decays = jax.tree.broadcast(True if decays is None else decays, params)
        p = params
        for i in range(1, math.ceil(n) + 1):
            t = adam.count + i
            rate = learning_rate(t - 1) if callable(learning_rate) else learning_rate
            rate = rate * min(1.0, n - i + 1)
            first = b1**i / (1 - b1**t)
            second = 1 - b2**t

            def one(p: Any, m: Any, v: Any, decay: bool, r: Any, first: Any, second: Any) -> Any:
                kept = p - r * weight_decay * p if decay else p
                return kept - (r * first * m / (jnp.sqrt(v / second) + eps)).astype(p.dtype)

            p = jax.tree.map(
                lambda *leaf, r=rate, a=first, b=second, one=one: one(*leaf, r, a, b),
                p,
                adam.mu,
                adam.nu,
                decays,
            )
        return jax.tree.map(jnp.subtract, p, params)

    return ahead


def states_of(opt_state: optax.OptState, kind: Any) -> list[Any]:
    """All states of the given types within an optimizer's state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]
