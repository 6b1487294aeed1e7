"""Layers from nnx modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen, nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from fdg_jax.calling import (
    Convention,
    Values,
    check_sequence,
    convention,
    is_library,
    mode_of,
)
from fdg_jax.layer import Layer, typed_key
from fdg_jax.typing import Key, PyTree


@dataclass(frozen=True)
class FromModule(Layer):
    """A layer from a module.

    Attributes:
      shared: finds parameters of a module that its factory does not create but reuses.
    """

    shared: Callable[[], list[Any]] = list


def from_nnx(
    factory: Callable[[nnx.Rngs], nnx.Module],
    *,
    train_kwargs: Values | None = None,
    eval_kwargs: Values | None = None,
) -> Layer:
    """A layer from an nnx module.

    Parameters (``nnx.Param``) become ``params``, all other variables except random state become
    ``state``, both as nested dicts. At every call the module's random streams are seeded from
    ``key``, and ``module.train()`` or ``module.eval()`` is called, as ``nnx.Dropout`` and
    ``nnx.BatchNorm`` require. Flags of ``__call__`` and boolean attributes with common names
    (``training``, ``is_training``, ``deterministic``, ``inference`` ...) are set as well; set flags
    with other names with ``train_kwargs``.

    Args:
      factory: makes the module from ``nnx.Rngs``; the module is called with one array (or pytree)
        and its flags.
      train_kwargs: flags of ``__call__`` and their values in training.
      eval_kwargs: their values in evaluation; None: inverted booleans.

    Returns:
      A `Layer`.

    Raises:
      ValueError: ``factory`` is a module, or does not make one; (when the module is first made) a
        flag without a value, or an argument without a default; (from ``apply``) the module draws
        random numbers in training and key is None, or creates weights in its call.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> dense = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
      >>> params, state = dense.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> sorted(params), params["kernel"].shape
      (['bias', 'kernel'], (3, 2))
    """

    check_factory(factory, "nnx.Linear(3, 2, rngs=rngs)")

    # The module's structure is found once, at first use, without computing anything.
    @functools.cache
    def skeleton() -> Skeleton:
        module = nnx.eval_shape(lambda: module_of(factory, nnx.Rngs(0)))
        arguments = _convention(module, train_kwargs, eval_kwargs)

        def call(module: Any, x: PyTree, train: bool) -> PyTree:
            args, kwargs = arguments(train)
            return module(x, *args, **kwargs)

        return skeleton_of(module, call)

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        del x
        skeleton()
        return values(module_of(factory, nnx.Rngs(typed_key(key))))

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        return skeleton().apply(params, state, x, train, key)

    return FromModule(
        init, apply, shared=lambda: made_outside(lambda: params_of(factory(nnx.Rngs(0))))
    )


def check_factory(factory: Any, example: str) -> None:
    """Rejects a module passed instead of a function that makes one.

    Args:
      factory: the argument.
      example: an expression for the error message.

    Raises:
      ValueError: it is a module, or not callable.
    """
    if isinstance(factory, (nnx.Module, linen.Module)) or not callable(factory):
        raise ValueError(
            f"factory: {type(factory).__name__} is no function; give one that makes the module, "
            f"such as lambda rngs: {example}"
        )


class Skeleton(NamedTuple):
    """A module without its values.

    Attributes:
      name: name of its class.
      graph, params, state: structures.
      rngs: its random state; only shapes are used.
      call: ``call(module, x, train) -> y``.
      first: the number of its first stream of random numbers.
    """

    name: str
    graph: Any
    params: Any
    rngs: Any
    state: Any
    call: Callable[[Any, PyTree, bool], PyTree]
    first: int

    def apply(
        self, params: PyTree, state: PyTree, x: PyTree, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        """The module's output and new state."""
        if train and key is None and jax.tree.leaves(self.rngs):
            raise ValueError("key=None: this module draws random numbers in training; give a key")
        module = nnx.merge(
            self.graph,
            jax.tree.unflatten(self.params, jax.tree.leaves(params)),
            _seeded(self.rngs, key, self.first),
            jax.tree.unflatten(self.state, [_unwritable(v) for v in jax.tree.leaves(state)]),
            copy=True,
        )
        _set_mode(module, train)
        y = self.call(module, x, train)
        _, new_params, _, new_state = _split(module)
        if jax.tree.structure(new_params) != self.params:
            raise ValueError(
                f"{self.name}: makes weights in its call, which nobody would train; "
                "make them in __init__"
            )
        return y, _kept(self.name, state, nnx.to_pure_dict(new_state))


def skeleton_of(
    module: nnx.Module, call: Callable[[Any, PyTree, bool], PyTree], first: int = 0
) -> Skeleton:
    """The skeleton of a module, whose values may be abstract.

    Args:
      module, call, first: see `Skeleton`.
    """
    graph, params, rngs, state = _split(module)
    structures = jax.tree.structure(params), rngs, jax.tree.structure(state)
    return Skeleton(type(module).__name__, graph, *structures, call, first)


def values(module: nnx.Module) -> tuple[PyTree, PyTree]:
    """Parameters and state of a module, both as nested dicts."""
    _, params, _, state = _split(module)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(state)


def params_of(module: nnx.Module) -> list[Any]:
    """The parameters of a module, as objects."""
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Param)]


def made_outside(make: Callable[[], list[Any]]) -> list[Any]:
    """The parameters that ``make`` reuses instead of creating."""
    calls: list[list[Any]] = []

    def call() -> None:
        calls.append(make())

    for _ in range(2):
        jax.eval_shape(lambda: call())  # a new function each time, because JAX caches shapes
    one, two = calls
    return [node for node in one if any(node is other for other in two)]


def module_of(factory: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """The result of a factory; raises if it is not an nnx module."""
    module = factory(rngs)
    if not isinstance(module, nnx.Module):
        raise ValueError(
            f"factory: makes {type(module).__name__}, which is no nnx module; linen modules go to "
            "fdg_jax.from_linen, functions to fdg_jax.from_fn"
        )
    return module


def _convention(module: Any, train_kwargs: Values | None, eval_kwargs: Values | None) -> Convention:
    """The module's calling convention."""
    name = type(module).__name__
    if isinstance(module, nnx.Sequential):
        check_sequence(module.layers, name, nnx.Module)
    return convention(module.__call__, name, train_kwargs, eval_kwargs)


def _kept(name: str, state: PyTree, new: PyTree) -> PyTree:
    """The new state, without values sown by the call."""
    old, found = flatten_dict(state), flatten_dict(new)
    for path in found.keys() - old.keys():
        if not isinstance(found[path], tuple):
            raise ValueError(
                f"{name}: makes the variable {'/'.join(map(str, path))} in its call; make it in "
                "__init__"
            )
    return new if found.keys() == old.keys() else unflatten_dict({p: found[p] for p in old})


def _set_mode(module: nnx.Module, train: bool) -> None:
    """Calls ``module.train()`` or ``module.eval()`` and sets attributes with common names."""
    for _, one in nnx.iter_modules(module):
        for name, value in list(vars(one).items()):
            mode = mode_of(name, train)
            if mode is not None and isinstance(value, bool) and not is_library(type(one)):
                setattr(one, name, mode)
    if train:
        nnx.Module.train(module)
    else:
        nnx.Module.eval(module)


def _split(module: nnx.Module) -> Any:
    """Structure, parameters, random state, and other variables without intermediates."""
    parts: Any = nnx.split(module, nnx.Param, nnx.RngState, nnx.Intermediate, ...)
    graph, params, rngs, _, state = parts
    return graph, params, rngs, state


def _unwritable(array: Any) -> Any:
    """A JAX array for a numpy array, which a module could modify in place."""
    return jax.numpy.asarray(array) if isinstance(array, np.ndarray) else array


def _seeded(rngs: PyTree, key: Key | None, first: int) -> PyTree:
    """Fresh random state; the key of stream number i is the key folded with i."""
    root = jax.random.key(0) if key is None else typed_key(key)
    leaves, structure = jax.tree.flatten(rngs)
    fresh: list[jax.Array] = []
    for i, leaf in enumerate(leaves, first):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            stream = jax.random.fold_in(root, i)
            fresh.append(jax.random.split(stream, leaf.shape) if leaf.shape else stream)
        else:
            fresh.append(jax.numpy.zeros(leaf.shape, leaf.dtype))
    return jax.tree.unflatten(structure, fresh)
