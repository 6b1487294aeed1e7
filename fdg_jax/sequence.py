"""Splitting an nnx or linen ``Sequential`` into layers.

Sequential(A, relu, Sequential(B, C))    layers: A, relu, B, C
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.extend import core

from fdg_jax.calling import check_sequence
from fdg_jax.layer import Layer, typed_key
from fdg_jax.linen_adapter import from_linen
from fdg_jax.nnx_adapter import (
    FromModule,
    Skeleton,
    check_factory,
    made_outside,
    module_of,
    params_of,
    skeleton_of,
    values,
)
from fdg_jax.typing import Key, PyTree

# Position of a callable: its number in the outermost sequence, then in the nested ones.
Path = tuple[int, ...]


@dataclass(frozen=True)
class InSequence(FromModule):
    """One layer of a sequence; derives random numbers from the key of the whole sequence.

    Attributes:
      place: its number in the sequence.
    """

    place: int = 0

    def key_at(self, key: Key, index: int | jax.Array) -> Key:
        return super().key_at(key, jnp.asarray(index, jnp.int32) - self.place)


def layers_of(sequence: Callable[[nnx.Rngs], nnx.Sequential] | linen.Sequential) -> list[Layer]:
    """Splits a ``Sequential`` into layers for `fdg_jax.partition`.

    The chain of the layers equals `from_nnx` or `from_linen` of the whole: the same initial
    weights, random numbers, outputs and gradients. Nested ``Sequential`` are split as well; a
    function such as ``nnx.relu`` is a layer without parameters.

    An nnx layer has the params and state of its module; a linen layer keeps their path in the
    whole, such as ``params["layers_2"]["kernel"]``. Layers that share one ``nnx.Rngs`` for their
    calls draw from copies of it.

    Args:
      sequence: for nnx, a function that makes the ``Sequential``, as in `from_nnx`; ``lambda rngs:
        module`` uses an existing module and its weights. For linen, the module.

    Returns:
      One layer per callable, input first.

    Raises:
      ValueError: not a ``Sequential``, or one without layers; a layer has flags, which a
        ``Sequential`` does not pass on; two layers share parameters or state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> layers = layers_of(lambda rngs: nnx.Sequential(
      ...     nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs)))
      >>> [jax.tree.map(jnp.shape, layer.init(jax.random.key(0), None)[0]) for layer in layers]
      [{'bias': (4,), 'kernel': (3, 4)}, (), {'bias': (2,), 'kernel': (4, 2)}]
    """
    if isinstance(sequence, linen.Module):
        return _linen_layers(sequence)
    check_factory(sequence, "nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), nnx.relu)")
    return _nnx_layers(sequence)


def _nnx_layers(factory: Callable[[nnx.Rngs], nnx.Sequential]) -> list[Layer]:
    whole = nnx.eval_shape(lambda: module_of(factory, nnx.Rngs(0)))
    paths = list(_paths(whole, "factory: makes", nnx))
    _check_unshared([_at(whole, path) for path in paths])
    modules = [n for n, path in enumerate(paths) if isinstance(_at(whole, path), nnx.Module)]

    @functools.cache
    def traced() -> tuple[core.ClosedJaxpr, Any]:
        """All initial values as a function of the key."""

        def initial(key: Key) -> dict[int, tuple[PyTree, PyTree]]:
            made = factory(nnx.Rngs(key))
            return {place: values(_at(made, paths[place])) for place in modules}

        return jax.make_jaxpr(initial, return_shape=True)(jax.random.key(0))

    layers: list[Layer] = []
    streams = 0  # random streams of the previous layers
    for place, path in enumerate(paths):
        module, call = _at(whole, path), functools.partial(_call, spreads=place > 0)
        if isinstance(module, nnx.Module):
            skeleton = skeleton_of(module, call, streams)
            streams += len(jax.tree.leaves(skeleton.rngs))
            layers.append(_nnx_layer(factory, place, path, skeleton, traced))
        else:
            layers.append(_function(module, call))
    return layers


def _nnx_layer(
    factory: Callable[[nnx.Rngs], nnx.Sequential],
    place: int,
    path: Path,
    skeleton: Skeleton,
    traced: Callable[[], tuple[core.ClosedJaxpr, Any]],
) -> Layer:
    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        del x
        return _part(*traced(), place, typed_key(key))

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        return skeleton.apply(params, state, x, train, key)

    def shared() -> list[Any]:
        return made_outside(lambda: params_of(_at(factory(nnx.Rngs(0)), path)))

    return InSequence(init, apply, shared=shared, place=place)


def _function(f: Callable[..., PyTree], call: Callable[..., PyTree]) -> Layer:
    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        del params, key
        return call(f, x, train), state

    return Layer(lambda key, x: ((), ()), apply)


class _LinenLayer(linen.Module):
    """A ``linen.Sequential`` that calls one of its layers; names and random numbers are kept."""

    layers: Sequence[Callable[..., Any]]
    where: Path

    @linen.compact
    def __call__(self, x: PyTree) -> PyTree:
        return _call(_at(self, self.where), x, True, spreads=any(self.where))


def _linen_layers(whole: Any) -> list[Layer]:
    paths = list(_paths(whole, "sequence:", linen))
    found = [_at(whole, path) for path in paths]
    _check_unshared(found)
    layers: list[Layer] = []
    for place, (path, module) in enumerate(zip(paths, found, strict=True)):
        if not isinstance(module, linen.Module):
            layers.append(_function(module, functools.partial(_call, spreads=place > 0)))
            continue
        one = from_linen(_LinenLayer(whole.layers, path))
        layers.append(InSequence(one.init, one.apply, place=place))
    return layers


def _paths(whole: Any, what: str, library: Any) -> Iterator[Path]:
    """The positions of the callables of a sequence, including nested sequences."""
    name = type(whole).__name__
    if not _is_sequence(whole, library):
        own = " with a __call__ of its own" if isinstance(whole, library.Sequential) else ""
        raise ValueError(
            f"{what} {name}{own}, which is no {library.__name__.removeprefix('flax.')}.Sequential; "
            "one layer is made of it with fdg_jax.from_nnx or fdg_jax.from_linen"
        )
    if not whole.layers:
        raise ValueError(f"{what} {name} without layers; give it at least one")
    check_sequence(whole.layers, name, library.Module)
    for number, one in enumerate(whole.layers):
        if _is_sequence(one, library):
            yield from ((number, *rest) for rest in _paths(one, what, library))
        else:
            yield (number,)


def _is_sequence(value: Any, library: Any) -> bool:
    kind = library.Sequential
    return isinstance(value, kind) and type(value).__call__ is kind.__call__


def _at(whole: Any, path: Path) -> Any:
    for number in path:
        whole = whole.layers[number]
    return whole


def _call(f: Callable[..., PyTree], x: PyTree, train: bool, *, spreads: bool) -> PyTree:
    """Calls f as a ``Sequential`` does: tuples and dicts become several arguments."""
    del train
    if spreads and isinstance(x, tuple):
        return f(*x)
    return f(**x) if spreads and isinstance(x, dict) else f(x)


def _check_unshared(found: list[Any]) -> None:
    """Rejects layers that share parameters or state."""
    first: dict[int, int] = {}
    for place, one in enumerate(found):
        parts: list[Any] = [one] if isinstance(one, linen.Module) else []
        if isinstance(one, nnx.Module):
            parts = [v for _, v in nnx.iter_graph(one) if isinstance(v, nnx.Variable)]
        for part in parts:
            other = first.setdefault(id(part), place)
            if other != place and not isinstance(part, nnx.RngState):
                raise ValueError(
                    f"layers {other} and {place} of the Sequential share {type(part).__name__}, "
                    "of which each would have its own; make a module for each, and tie arrays "
                    "with Pipeline(tie=fdg.tie(...))"
                )


def _part(
    closed: core.ClosedJaxpr, shapes: dict[int, tuple[PyTree, PyTree]], place: int, key: Key
) -> tuple[PyTree, PyTree]:
    """The initial values of one layer, from the operations of the factory that it needs.

    They run one by one, as in the factory, so the values are bitwise identical.
    """
    leaves, structure = jax.tree.flatten(shapes[place])
    before = sum(len(jax.tree.leaves(shapes[n])) for n in shapes if n < place)
    outputs = closed.jaxpr.outvars[before : before + len(leaves)]
    needed = {v for v in outputs if isinstance(v, core.Var)}
    operations = []
    for operation in reversed(closed.jaxpr.eqns):
        if needed & set(operation.outvars):
            operations.append(operation)
            needed |= {v for v in operation.invars if isinstance(v, core.Var)}
    jaxpr = closed.jaxpr.replace(eqns=operations[::-1], outvars=outputs)
    made = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))(key)
    arrays = [jnp.asarray(v, leaf.dtype) for v, leaf in zip(made, leaves, strict=True)]
    params, state = jax.tree.unflatten(structure, arrays)
    return params, state
