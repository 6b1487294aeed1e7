"""Layers from nnx modules, linen modules and plain functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from fdg_jax.layer import Layer, typed_key
from fdg_jax.typing import Key, PyTree


def from_nnx(factory: Callable[[nnx.Rngs], nnx.Module]) -> Layer:
    """A layer from an nnx module.

    Parameters (``nnx.Param``) become ``params``, everything else but random state becomes
    ``state``, both as plain nested dicts. The module's random streams are seeded anew from ``key``
    at every call, and ``module.train()`` or ``module.eval()`` is called first, so ``nnx.Dropout``
    and ``nnx.BatchNorm`` do what they should.

    Args:
      factory: makes the module from ``nnx.Rngs``; the module is called with one argument.

    Returns:
      A `Layer`.

    Raises:
      ValueError: (from ``apply``) the module draws random numbers in training and key is None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> dense = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
      >>> params, state = dense.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> sorted(params), params["kernel"].shape
      (['bias', 'kernel'], (3, 2))
    """

    # The module's structure is found once, at first use, without computing anything.
    @functools.cache
    def skeleton() -> tuple[Any, ...]:
        module = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
        graph, params, rngs, state = _split(module)
        return graph, jax.tree.structure(params), jax.tree.structure(state), rngs

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        del x
        module = factory(nnx.Rngs(typed_key(key)))
        _, params, _, state = _split(module)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        graph, params_structure, state_structure, rngs = skeleton()
        if train and key is None and jax.tree.leaves(rngs):
            raise ValueError("key=None: this module draws random numbers in training; give a key")
        module = nnx.merge(
            graph,
            jax.tree.unflatten(params_structure, jax.tree.leaves(params)),
            _seeded(rngs, key),
            jax.tree.unflatten(state_structure, [_unwritable(v) for v in jax.tree.leaves(state)]),
            copy=True,
        )
        if train:
            module.train()
        else:
            module.eval()
        y = module(x)
        _, _, _, new_state = _split(module)
        return y, nnx.to_pure_dict(new_state)

    return Layer(init, apply)


def _split(module: nnx.Module) -> Any:
    """Structure, parameters, random state, everything else but what a call only lets one see."""
    parts: Any = nnx.split(module, nnx.Param, nnx.RngState, nnx.Intermediate, ...)
    graph, params, rngs, _, state = parts
    return graph, params, rngs, state


def _unwritable(array: Any) -> Any:
    """An array that a module cannot write into: of numpy's it would change the caller's own."""
    return jax.numpy.asarray(array) if isinstance(array, np.ndarray) else array


def _seeded(rngs: PyTree, key: Key | None) -> PyTree:
    """Random state in which stream number i has the key folded with i and nothing drawn yet."""
    root = jax.random.key(0) if key is None else typed_key(key)
    leaves, structure = jax.tree.flatten(rngs)
    fresh: list[jax.Array] = []
    for i, leaf in enumerate(leaves):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            stream = jax.random.fold_in(root, i)
            fresh.append(jax.random.split(stream, leaf.shape) if leaf.shape else stream)
        else:
            fresh.append(jax.numpy.zeros(leaf.shape, leaf.dtype))
    return jax.tree.unflatten(structure, fresh)


def from_linen(module: linen.Module) -> Layer:
    """A layer from a linen module.

    The collection ``params`` becomes ``params``, all others become ``state``. Where ``__call__``
    takes ``train``, ``deterministic`` or ``use_running_average``, it is given.

    Args:
      module: called with one array (or pytree) and the keywords above.

    Returns:
      A `Layer`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> dense = from_linen(linen.Dense(2))
      >>> params, state = dense.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> params["kernel"].shape, state
      ((3, 2), {})
    """
    accepted = inspect.signature(type(module).__call__).parameters

    def mode(train: bool) -> dict[str, Any]:
        values = {"train": train, "deterministic": not train, "use_running_average": not train}
        return {name: value for name, value in values.items() if name in accepted}

    def streams(key: Key) -> dict[str, Key]:
        # linen falls back to the stream "params" for every name that is not given.
        return {"params": key, "dropout": jax.random.fold_in(key, 1)}

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        def variables(key: Key, x: PyTree) -> PyTree:
            return module.init(streams(key), x, **mode(train=False))

        state = dict(jax.jit(variables)(key, x))
        return state.pop("params", {}), state

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        variables = {"params": params, **state}
        rngs = None if key is None else streams(key)
        if not (train and state):
            return module.apply(variables, x, rngs=rngs, **mode(train)), state
        y, new_state = module.apply(variables, x, rngs=rngs, mutable=list(state), **mode(train))
        return y, dict(new_state)

    return Layer(init, apply)


def from_fn(f: Callable[[PyTree], PyTree]) -> Layer:
    """A layer without parameters from a function of one argument.

    Args:
      f: ``f(x) -> y``, traceable by JAX.

    Returns:
      A `Layer` whose params and state are ``()``.

    Example:
      >>> import jax.numpy as jnp
      >>> from_fn(jnp.abs).apply((), (), -jnp.ones(1), train=True, key=None)[0].item()
      1.0
    """

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        del params, train, key
        return f(x), state

    return Layer(lambda key, x: ((), ()), apply)
