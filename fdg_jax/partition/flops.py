"""FLOPs of a function as XLA counts them, with every iteration of a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.extend.core.primitives import scan_p

from fdg_jax.typing import PyTree


def flops(function: Callable[..., PyTree], *arguments: PyTree) -> float:
    r"""FLOPs of a function, loops of known length included.

    XLA's cost analysis counts the body of a loop as often as it is written out, u(s), mostly once.
    With x(f) for XLA's number, and scans s of length n(s) with bodies b(s) in f,

    .. math::
        c(f) = x(f) + \sum_s \left( n(s) \, c(b(s)) - u(s) \, x(b(s)) \right)

    A ``while_loop`` has no known length, and counts once; it has no reverse derivative either. Of a
    ``cond`` XLA counts the branches.

    Args:
      function: of arrays.
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
    total = _of_xla(jaxpr)
    for length, counted, body in _scans(jaxpr.jaxpr):
        total += length * _counted(body) - counted * _of_xla(body)
    return total


def _of_xla(jaxpr: ClosedJaxpr) -> float:
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in jaxpr.in_avals]
    analysis = jax.jit(jaxpr_as_fun(jaxpr)).lower(*shapes).cost_analysis()
    if not isinstance(analysis, dict):
        raise ValueError(
            'cost="flops": this platform does not count FLOPs; use cost="time", or give the costs'
        )
    return float(analysis.get("flops", 0.0))


def _scans(jaxpr: Jaxpr) -> Iterator[tuple[int, int, ClosedJaxpr]]:
    """Of the outermost scans: length, how often XLA counts the body, and the body."""
    for equation in jaxpr.eqns:
        if equation.primitive is scan_p:
            length, unroll = equation.params["length"], int(equation.params["unroll"])
            counted = length if length <= unroll else unroll + length % unroll
            yield length, counted, equation.params["jaxpr"]
            continue
        for inner in _inner(list(equation.params.values())):
            yield from _scans(inner)


def _inner(values: list[Any]) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from _inner(list(value))
