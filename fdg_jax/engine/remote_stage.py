"""Stand-ins for the programs of stages on devices of other processes.

JAX would take such a call too, and compile the program, which every process would then do for
every stage. What the others need of it are shapes and places.
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
      donated: names of arguments whose buffers it may take.
      static: name of the argument that is no array.
    """
    if replicated.addressable_devices:
        return jax.jit(function, donate_argnames=donated or None, static_argnames=static)
    return Elsewhere(replicated, places, function, batched)


def shapes(program: Callable[..., Any], *arrays: PyTree) -> PyTree:
    """Shapes and dtypes of a program's outputs; computes nothing.

    Args:
      program: of `program`.
      *arrays: its arguments, abstract ones with their shardings: then a later call with such arrays
        returns the same structure, residuals included.
    """
    return program(*arrays) if isinstance(program, Elsewhere) else jax.eval_shape(program, *arrays)


class Elsewhere:
    """A stand-in for ``jax.jit(function)``; traces once per input shape.

    Args:
      replicated: where its outputs are.
      places: where those are that have the batch axis; one without any is replicated.
      function: pure.
      batched: which of its outputs has that axis; None: all of them.
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
            # Nothing is in these arrays, so that one may stand for those of every call.
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
