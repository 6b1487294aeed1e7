"""Determines by tracing which outputs of a function depend on which inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal
from jax.extend.core.primitives import cond_p, scan_p

from fdg_jax.jaxprs import inner
from fdg_jax.typing import PyTree


def depends(function: Callable[..., PyTree], first: PyTree, *rest: PyTree) -> list[bool]:
    """Whether the leaves of a function's outputs depend on its first argument.

    Unknown dependences count as such: those of a ``while_loop``, or of operations that call
    functions in an unknown way.

    Args:
      function: takes pytrees of arrays; it is only traced.
      first, rest: its arguments, which may be abstract, or tracers.

    Returns:
      A boolean per leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> def attend(w, x, mask):
      ...     return {"x": w * x + mask, "mask": 2 * mask}
      >>> depends(attend, jnp.ones(3), jnp.ones(3), jnp.zeros(3))  # of "mask" and "x"
      [False, True]
    """
    jaxpr = jax.make_jaxpr(function)(first, *rest).jaxpr
    count = len(jax.tree.leaves(first))
    return _outputs(jaxpr, [i < count for i in range(len(jaxpr.invars))])


def _outputs(jaxpr: Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    known = {var for var, given in zip(jaxpr.invars, inputs, strict=True) if given}

    def flags(variables: Sequence[Any]) -> list[bool]:
        return [not isinstance(var, Literal) and var in known for var in variables]

    for equation in jaxpr.eqns:
        given = flags(equation.invars)
        if any(given):
            found = _of_equation(equation, given)
            known |= {var for var, one in zip(equation.outvars, found, strict=True) if one}
    return flags(jaxpr.outvars)


def _of_equation(equation: Any, given: list[bool]) -> list[bool]:
    everything = [True] * len(equation.outvars)
    called = list(inner(equation.params.values()))
    if equation.primitive is scan_p:
        consts, carry = equation.params["num_consts"], equation.params["num_carry"]
        while True:  # until the dependences of the carry no longer change
            found = _outputs(called[0], given)
            more = [a or b for a, b in zip(given[consts:], found[:carry], strict=False)]
            if more == given[consts : consts + carry]:
                return found
            given = [*given[:consts], *more, *given[consts + carry :]]
    if equation.primitive is cond_p:
        if given[0]:
            return everything
        branches = [_outputs(branch, given[1:]) for branch in called]
        return [any(one) for one in zip(*branches, strict=True)]
    if len(called) != 1 or len(called[0].invars) != len(given):
        return everything
    if len(called[0].outvars) != len(everything):
        return everything
    return _outputs(called[0], given)
