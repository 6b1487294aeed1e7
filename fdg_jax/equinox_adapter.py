"""Layers from Equinox modules. Equinox is optional and imported only when used."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.calling import Values, convention, mode_of
from fdg_jax.layer import Layer, typed_key
from fdg_jax.nnx_adapter import FromModule, made_outside
from fdg_jax.typing import Key, PyTree

# Arguments of a module's call besides its input and its flags.
_GIVEN = frozenset({"key", "state"})


def from_equinox(
    factory: Callable[[Key], Any],
    *,
    axis_name: Hashable | None = "batch",
    train_kwargs: Values | None = None,
    eval_kwargs: Values | None = None,
) -> Layer:
    """A layer from an Equinox module.

    Floating-point and complex arrays become ``params``; other arrays and ``equinox.nn.State``
    become ``state``, as nested dicts. The module is called with one example, under ``jax.vmap``
    over the batch, the Equinox convention; with ``axis_name=None`` it is called with the whole
    batch. A ``key`` argument of the call receives a key per example (or per batch), in evaluation
    always the same. A ``state`` argument receives the state; the call then returns ``(y, state)``.

    Attributes named ``inference`` are set as by ``equinox.nn.inference_mode``. Other booleans with
    common names (``training``, ``deterministic`` ...) and flags of ``__call__`` are set as well;
    set flags with other names with ``train_kwargs``.

    Args:
      factory: makes the module from a key, or the module and its state, as
        ``equinox.nn.make_with_state`` does, which is otherwise applied here.
      axis_name: name of the batch axis in ``jax.vmap``, as used by ``equinox.nn.BatchNorm``. It is
        the first axis of every input array. None: the module is called with whole batches.
      train_kwargs: flags of ``__call__`` and their values in training.
      eval_kwargs: their values in evaluation; None: inverted booleans.

    Returns:
      A `Layer`.

    Raises:
      ImportError: Equinox is not installed.
      ValueError: ``factory`` is a module, or does not make one; (when the module is first made) a
        flag without a value, an argument without a default, or a state that the call does not
        accept; (from ``apply``) the module draws random numbers in training and key is None, or its
        batch normalisation uses another axis name.

    Example:
      >>> import equinox, jax, jax.numpy as jnp
      >>> dense = from_equinox(lambda key: equinox.nn.Linear(3, 2, key=key))
      >>> params, state = dense.init(jax.random.key(0), jnp.ones((8, 3)))
      >>> params["weight"].shape, state
      ((2, 3), {})
      >>> dense.apply(params, state, jnp.ones((8, 3)), train=True, key=None)[0].shape
      (8, 2)
    """
    try:
        import equinox
    except ImportError as error:
        raise ImportError(
            "from_equinox needs Equinox, which is not installed; pip install equinox"
        ) from error
    if is_equinox(factory) or not callable(factory):
        raise ValueError(
            f"factory: {type(factory).__name__} is no function; give one that makes the module, "
            "such as lambda key: equinox.nn.Linear(3, 2, key=key)"
        )

    def made(key: Key) -> tuple[Any, Any]:
        found = factory(key)
        pair = isinstance(found, tuple) and len(found) == 2
        if pair and isinstance(found[1], equinox.nn.State):
            return found[0], found[1]
        if not isinstance(found, equinox.Module):
            raise ValueError(
                f"factory: makes {type(found).__name__}, which is no Equinox module; functions go "
                "to fdg_jax.from_fn"
            )
        return equinox.nn.make_with_state(lambda: found)()

    # The module's structure is found once, at first use, without computing anything.
    @functools.cache
    def skeleton() -> Skeleton:
        module, state = equinox.filter_eval_shape(made, jax.random.key(0))
        _check_static(module, equinox.Module)
        return _skeleton(module, state, train_kwargs, eval_kwargs)

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        del x
        skeleton()
        return _values(*made(typed_key(key)))

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        own = skeleton()
        if not train:
            key = jax.random.key(0)
        module = equinox.nn.inference_mode(own.module(params, state, train), not train)
        stateful = own.state(state)

        def call(x: PyTree, stateful: Any, key: Key | None) -> tuple[PyTree, Any]:
            return own.call(module, x, stateful, key, train)

        try:
            if axis_name is None:
                y, stateful = call(x, stateful, None if key is None else typed_key(key))
            else:
                y, stateful = _mapped(call, axis_name, x, stateful, key)
        except NameError as error:
            raise ValueError(
                f"axis_name={axis_name!r}: {own.name} uses an axis of another name ({error}); give "
                "its name"
            ) from error
        except RuntimeError as error:
            if train and key is None:
                raise ValueError(
                    "key=None: this module draws random numbers in training; give a key"
                ) from error
            raise
        if not train or stateful is None:
            return y, state
        return y, {**state, "state": tuple(jax.tree.leaves(stateful))}

    def params() -> list[Any]:
        return [v for v in jax.tree.leaves(made(jax.random.key(0))[0]) if _is_param(v)]

    return FromModule(init, apply, shared=lambda: made_outside(params))


class Skeleton(NamedTuple):
    """A module without its arrays.

    Attributes:
      name: name of its class.
      structure: tree structure of its leaves.
      leaves: a `_Place` for each array, and the leaves that are not arrays.
      stateful: the structure of its ``equinox.nn.State``; None without state.
      arguments: flags of the call.
      takes: which of "key" and "state" the call accepts.
    """

    name: str
    structure: Any
    leaves: list[Any]
    stateful: Any
    arguments: Callable[[bool], tuple[tuple[Any, ...], dict[str, Any]]]
    takes: frozenset[str]

    def module(self, params: PyTree, state: PyTree, train: bool) -> Any:
        """The module with its arrays and flags."""
        leaves = []
        for leaf in self.leaves:
            if isinstance(leaf, _Place):
                leaf = leaf.of(params if leaf.trained else state["arrays"])
            elif isinstance(leaf, _Flag):
                leaf = mode_of(leaf.name, train)
            leaves.append(leaf)
        return jax.tree.unflatten(self.structure, leaves)

    def state(self, state: PyTree) -> Any:
        """The module's ``equinox.nn.State``, or None."""
        if self.stateful is None:
            return None
        return jax.tree.unflatten(self.stateful, state.get("state", ()))

    def call(
        self, module: Any, x: PyTree, stateful: Any, key: Key | None, train: bool
    ) -> tuple[PyTree, Any]:
        """The module's output and new state."""
        args, kwargs = self.arguments(train)
        if "key" in self.takes:
            kwargs = {**kwargs, "key": key}
        if stateful is None:
            return module(x, *args, **kwargs), None
        made = module(x, *args, state=stateful, **kwargs)
        if not (isinstance(made, tuple) and len(made) == 2 and type(made[1]) is type(stateful)):
            raise ValueError(f"{self.name}: takes a state; its call must return (y, state)")
        return made


class _Place(NamedTuple):
    """Position of a module's array in the nested dicts."""

    path: tuple[Any, ...]
    trained: bool

    def of(self, tree: PyTree) -> Any:
        return functools.reduce(lambda inner, name: inner[name], self.path, tree)


class _Flag(NamedTuple):
    """An attribute that selects training or evaluation mode."""

    name: str


def _skeleton(
    module: Any, state: Any, train_kwargs: Values | None, eval_kwargs: Values | None
) -> Skeleton:
    name, call = type(module).__name__, module.__call__
    parameters = inspect.signature(call).parameters
    takes = _GIVEN & parameters.keys()
    has_state = bool(jax.tree.leaves(state))
    if has_state and "state" not in takes:
        raise ValueError(
            f"{name}: has a state that its call does not take; write __call__(self, x, state) and "
            "return (y, state)"
        )
    if "state" in takes and parameters["state"].default is inspect.Parameter.empty:
        has_state = True
    if _of_equinox(type(module)) and train_kwargs is None:
        arguments: Any = lambda train: ((), {})  # noqa: E731, its flags are attributes
    else:
        arguments = convention(call, name, train_kwargs, eval_kwargs, _GIVEN)
    found, structure = jax.tree_util.tree_flatten_with_path(module)
    leaves: list[Any] = []
    for path, leaf in found:
        last = str(getattr(path[-1], "name", "")) if path else ""
        if _is_array(leaf):
            leaf = _Place(_names(path), _is_param(leaf))
        elif isinstance(leaf, bool) and mode_of(last, True) is not None:
            leaf = _Flag(last)
        leaves.append(leaf)
    stateful = jax.tree.structure(state) if has_state else None
    return Skeleton(name, structure, leaves, stateful, arguments, takes)


def _values(module: Any, state: Any) -> tuple[PyTree, PyTree]:
    """The arrays of a module, divided into params and state."""
    params: dict[Any, Any] = {}
    arrays: dict[Any, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(module):
        if _is_array(leaf):
            *outer, name = _names(path)
            inner = params if _is_param(leaf) else arrays
            for one in outer:
                inner = inner.setdefault(one, {})
            inner[name] = leaf
    rest = {"arrays": arrays, "state": tuple(jax.tree.leaves(state))}
    return params, {name: part for name, part in rest.items() if part}


def _mapped(
    call: Callable[..., tuple[PyTree, Any]],
    axis_name: Hashable,
    x: PyTree,
    stateful: Any,
    key: Key | None,
) -> tuple[PyTree, Any]:
    """Calls the module per example; the state is shared by the batch."""
    keys = None
    if key is not None:
        keys = jax.random.split(typed_key(key), jax.tree.leaves(x)[0].shape[0])
    mapped = jax.vmap(
        call,
        in_axes=(0, None, None if keys is None else 0),
        out_axes=(0, None),
        axis_name=axis_name,
    )
    return mapped(x, stateful, keys)


def _check_static(module: Any, kind: type[Any]) -> None:
    """Rejects flags that are static fields, since the module's structure cannot change."""
    inner = jax.tree.leaves(module, is_leaf=lambda v: v is not module and isinstance(v, kind))
    for one in inner:
        if isinstance(one, kind):
            _check_static(one, kind)
    for field in dataclasses.fields(module) if not _of_equinox(type(module)) else ():
        value = getattr(module, field.name, None)
        flag = isinstance(value, bool) and mode_of(field.name, True) is not None
        if flag and field.metadata.get("static", False):
            raise ValueError(
                f"{type(module).__name__}: its static field {field.name}={value} would be the same "
                "in training and evaluation; make it a field that is not static, which is set, or "
                "give it another name if it never changes"
            )


def _names(path: jax.tree_util.KeyPath) -> tuple[Any, ...]:
    """A path as the keys of nested dicts: names of attributes, numbers in lists."""
    kinds = "name", "idx", "key"
    return tuple(getattr(entry, next(k for k in kinds if hasattr(entry, k))) for entry in path)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _is_param(leaf: Any) -> bool:
    return _is_array(leaf) and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def is_equinox(value: Any) -> bool:
    """Whether a value is an Equinox module, except functions wrapped by ``equinox.filter_jit``."""
    if isinstance(value, type) or hasattr(value, "__wrapped__"):
        return False
    return any(_of_equinox(base) for base in type(value).__mro__)


def _of_equinox(kind: type[Any]) -> bool:
    return kind.__module__.split(".")[0] == "equinox"
