"""FLOPs of a function as counted by XLA, with every iteration of a loop."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.extend.core.primitives import cond_p, scan_p, while_p

from fdg_jax.jaxprs import inner
from fdg_jax.typing import PyTree


def flops(function: Callable[..., PyTree], *arguments: PyTree) -> float:
    r"""FLOPs of a function, including loops of known length.

    XLA's cost analysis counts a loop body as often as it is unrolled, mostly once. With x for its
    count, scans s of length n(s) with bodies b(s), and conds d with branches b_i(d),

    .. math::
        c(f) = x(f) + \sum_s \left( n(s) \, c(b(s)) - x(s) \right)
               + \sum_d \left( \max_i c(b_i(d)) - x(d) \right)

    A ``while_loop`` that counts between two constants is treated like a scan; others count once.
    If several branches have loops, x also counts a body of another branch.

    Args:
      function: a function of arrays.
      arguments: arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      FLOPs.

    Raises:
      ValueError: the platform does not count FLOPs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def once(h, _):
      ...     return h @ h, None
      >>> x = jnp.ones((8, 8))
      >>> flops(lambda h: jax.lax.scan(once, h, length=10)[0], x) / flops(lambda h: h @ h, x) > 9.9
      True
    """
    return _counted(jax.make_jaxpr(function)(*arguments))


def _counted(jaxpr: ClosedJaxpr) -> float:
    return _of_xla(jaxpr) + _missed(jaxpr.jaxpr)


def _missed(jaxpr: Jaxpr) -> float:
    """The FLOPs missing from XLA's count."""
    missed = 0.0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive is scan_p:
            missed += params["length"] * _counted(params["jaxpr"]) - _alone(equation)
        elif equation.primitive is cond_p:
            missed += max(map(_counted, params["branches"])) - _alone(equation)
        elif equation.primitive is while_p and (length := _length(equation)) is not None:
            missed += length * _counted(params["body_jaxpr"]) - _alone(equation)
        else:
            missed += sum(map(_missed, inner(params.values())))
    return missed


def _alone(equation: JaxprEqn) -> float:
    """XLA's count for one equation."""
    avals: list[Any] = [v.aval for v in equation.invars]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    bind = functools.partial(equation.primitive.bind, **equation.params)
    return _of_xla(jax.make_jaxpr(bind)(*shapes))


def _length(equation: Any) -> int | None:
    """The trip count of a counting ``while_loop``; otherwise None."""
    condition, body = equation.params["cond_jaxpr"].jaxpr, equation.params["body_jaxpr"].jaxpr
    consts = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    match [(one.primitive.name, *one.invars) for one in condition.eqns]:
        case [("lt", variable, Literal(val=end))] if variable in condition.invars:
            place = condition.invars.index(variable) - consts[0]
        case _:
            return None
    begin, after = equation.invars[sum(consts) + place], body.outvars[place]
    counter = body.invars[consts[1] + place]
    for one in body.eqns:
        match one.primitive.name, one.invars, begin:
            case "add", [variable, Literal(val=step)], Literal(val=first):
                if one.outvars[0] is after and variable is counter and step > 0:
                    return max(0, math.ceil((end - first) / step))
    return None


def _of_xla(jaxpr: ClosedJaxpr) -> float:
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in jaxpr.in_avals]
    analysis = jax.jit(jaxpr_as_fun(jaxpr)).lower(*shapes).cost_analysis()
    if not isinstance(analysis, dict):
        raise ValueError(
            'cost="flops": this platform does not count FLOPs; use cost="time", or give the costs'
        )
    return float(analysis.get("flops", 0.0))
