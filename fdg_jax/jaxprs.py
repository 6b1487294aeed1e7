"""The jaxprs in an equation's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def inner(values: Iterable[Any]) -> Iterator[Jaxpr]:
    """Yields the functions that an equation calls, in order.

    Args:
      values: the values of the equation's parameters.

    Example:
      >>> import jax
      >>> [equation] = jax.make_jaxpr(jax.jit(lambda x: 2 * x))(1.0).eqns
      >>> len(list(inner(equation.params.values())))
      1
    """
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from inner(value)
