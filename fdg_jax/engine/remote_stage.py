"""Stand-ins for the programs of stages on devices of other processes.

JAX accepts such calls, but every process would then compile the programs of every stage. Other
processes only need shapes and placement of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from fdg_jax.engine.placement import absent
from fdg_jax.typing import PyTree


def program(
    replicated: NamedSharding,
    places: Callable[[PyTree], PyTree],
    function: Callable[..., Any],
    batched: int | None,
    donated: tuple[str, ...] = (),
    static: str | None = None,
) -> Callable[..., Any]:
    """A stage's function as a program: jitted on its own process, otherwise a stand-in.

    Args:
      replicated, places, function, batched: see `Elsewhere`.
      donated: names of arguments with donated buffers.
      static: name of the static argument.
    """
    if replicated.addressable_devices:
        return jax.jit(function, donate_argnames=donated or None, static_argnames=static)
    return Elsewhere(replicated, places, function, batched)


def shapes(program: Callable[..., Any], *arrays: PyTree) -> PyTree:
    """Shapes and dtypes of a program's outputs; computes nothing.

    Args:
      program: a result of `program`.
      *arrays: its arguments; abstract ones need their shardings, so that a later call with such
        arrays returns the same structure, residuals included.
    """
    return program(*arrays) if isinstance(program, Elsewhere) else jax.eval_shape(program, *arrays)


class Elsewhere:
    """A stand-in for ``jax.jit(function)``; traces once per input shape.

    Args:
      replicated: the sharding of its outputs.
      places: the shardings of outputs with a batch axis.
      function: a pure function.
      batched: position of the output with a batch axis; None: all outputs.
    """

    def __init__(
        self,
        replicated: NamedSharding,
        places: Callable[[PyTree], PyTree],
        function: Callable[..., Any],
        batched: int | None,
    ) -> None:
        self._function = function
        self._replicated = replicated
        self._places = places
        self._batched = batched
        self._known: dict[Any, PyTree] = {}

    def __call__(self, *arrays: PyTree, **static: Any) -> PyTree:
        leaves, structure = jax.tree.flatten(arrays)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self._function(*arrays, **static)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        seen = (structure, shapes, tuple(static.items()))
        if seen not in self._known:
            # These arrays have no data here, so all calls can share them.
            outputs = jax.eval_shape(lambda *a: self._function(*a, **static), *arrays)
            self._known[seen] = self._place(outputs)
        return self._known[seen]

    def _place(self, outputs: PyTree) -> PyTree:
        def spread(tree: PyTree) -> PyTree:
            return absent(tree, self._places(tree))

        if self._batched is None:
            return spread(outputs)
        parts = [
            spread(part) if i == self._batched else absent(part, self._replicated)
            for i, part in enumerate(outputs)
        ]
        return type(outputs)(*parts) if hasattr(outputs, "_fields") else tuple(parts)
