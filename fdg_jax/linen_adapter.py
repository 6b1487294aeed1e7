"""Layers from linen modules."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, linen
from flax.core import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict

from fdg_jax.calling import Values, check_sequence, convention, is_library, mode_of, modes
from fdg_jax.layer import Layer
from fdg_jax.typing import Key, PyTree

# Collections that do not become state.
_NO_STATE = DenyList(("params", "intermediates"))
Path = tuple[str, ...]


def from_linen(
    module: linen.Module, *, train_kwargs: Values | None = None, eval_kwargs: Values | None = None
) -> Layer:
    """A layer from a linen module.

    The collection ``params`` becomes ``params``, all others become ``state``. Flags with common
    names (``train``, ``training``, ``is_training``, ``deterministic``, ``use_running_average``,
    ``inference``, ``eval`` ...) are set; set flags with other names with ``train_kwargs``.
    Variables are those created in training or evaluation. For sown values (``Module.sow``, by
    default a tuple) the state contains those of the last call. In evaluation the random streams are
    always the same.

    Args:
      module: called with one array (or pytree) and its flags.
      train_kwargs: flags of ``__call__``, or fields of the module, and their values in training.
      eval_kwargs: their values in evaluation; None: inverted booleans.

    Returns:
      A `Layer`.

    Raises:
      ValueError: not an instance of a linen module; a flag that is not set, or a parameter
        without a default; (from ``init``) variables that only ``apply`` creates; (from ``apply``)
        random numbers are drawn in training and key is None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> dense = from_linen(linen.Dense(2))
      >>> params, state = dense.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> params["kernel"].shape, state
      ((3, 2), {})
    """
    if not isinstance(module, linen.Module):
        given = module.__name__ if isinstance(module, type) else type(module).__name__
        raise ValueError(
            f"module: {given} is no instance of a linen module; give one, such as linen.Dense(2), "
            "and modules of nnx to fdg_jax.from_nnx"
        )
    name = type(module).__name__
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.init}
    trained, evaluated = modes(train_kwargs, eval_kwargs)
    own = inspect.signature(module.__call__).parameters
    of_call = None if train_kwargs is None else {k: trained[k] for k in trained if k in own}
    if of_call is not None and any(k not in own and k not in fields for k in trained):
        of_call = dict(trained)
    in_eval = None if of_call is None else {k: evaluated[k] for k in of_call}
    of_fields = {k for k in trained if of_call is None or k not in of_call}
    _check_fields(module, name, fields, of_fields | own.keys())
    # If a field is set, the parameter of the call with the same name is not needed.
    both = own.keys() & fields.keys()
    fixed = {k for k in both if isinstance(fields[k], bool) and own[k].default is None}
    arguments = convention(module.__call__, name, of_call, in_eval, fixed - trained.keys())
    if isinstance(module, linen.Sequential):
        check_sequence(module.layers, name, linen.Module)

    def placed(train: bool) -> linen.Module:
        given = trained if train else evaluated
        return module.clone(**{k: given[k] for k in of_fields}) if of_fields else module

    def streams(key: Key) -> dict[str, Key]:
        # linen uses the stream "params" for all missing names.
        return {"params": key, "dropout": jax.random.fold_in(key, 1)}

    def run(variables: PyTree, x: PyTree, train: bool, key: Key | None, mutable: Any) -> Any:
        if not train and key is None:
            key = jax.random.key(0)
        args, kwargs = arguments(train)
        rngs = None if key is None else streams(key)
        try:
            return placed(train).apply(variables, x, *args, rngs=rngs, mutable=mutable, **kwargs)
        except errors.InvalidRngError as error:
            if key is None:
                raise ValueError(
                    "key=None: this module draws random numbers in training; give a key"
                ) from error
            raise

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        def variables(key: Key, x: PyTree) -> PyTree:
            def made(train: bool) -> PyTree:
                args, kwargs = arguments(train)
                return placed(train).init(streams(key), x, *args, **kwargs)

            return _joined(made(train=False), made(train=True))

        state = dict(jax.jit(variables)(key, x))
        params = state.pop("params", {})

        def train(state: PyTree) -> PyTree:
            return run({"params": params, **state}, x, True, key, _NO_STATE)[1]

        return params, _with_sown(name, state, train)

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        variables = {"params": params, **state}
        if not (train and state):
            return run(variables, x, train, key, False), state
        mutable = list(state)
        if any(isinstance(v, tuple) for v in flatten_dict(state).values()):

            def after(state: PyTree) -> PyTree:
                return run({"params": params, **state}, x, True, key, mutable)[1]

            kept = _without(state, _sown(state, jax.eval_shape(after, state)))
            variables = {"params": params, **kept}
        y, new_state = run(variables, x, train, key, mutable)
        return y, dict(new_state)

    return Layer(init, apply)


def _check_fields(module: linen.Module, name: str, fields: dict[str, Any], given: set[str]) -> None:
    """Rejects a field that looks like a flag but is never set."""
    if is_library(module.__call__):
        return
    for key, value in fields.items():
        if isinstance(value, bool) and mode_of(key, True) is not None and key not in given:
            raise ValueError(
                f"{name}: its field {key}={value} would be the same in training and evaluation; "
                f"if it says that the network is trained, give train_kwargs={{{key!r}: "
                f"{mode_of(key, True)}}}; if it never changes, train_kwargs={{{key!r}: {value}}}, "
                f"eval_kwargs={{{key!r}: {value}}}"
            )


def _joined(a: PyTree, b: PyTree) -> PyTree:
    """Merges nested dictionaries; ``a`` takes precedence."""
    joined = dict(b)
    for key, value in a.items():
        both = isinstance(value, dict) and isinstance(b.get(key), dict)
        joined[key] = _joined(value, b[key]) if both else value
    return joined


def _sown(state: PyTree, after: PyTree) -> set[Path]:
    """The paths at which a call sowed values."""
    old = flatten_dict(state)
    return {
        path
        for path, new in flatten_dict(after).items()
        if isinstance(new, tuple) and len(new) != len(old.get(path, ()))
    }


def _without(state: PyTree, paths: set[Path]) -> PyTree:
    if not paths:
        return state
    return unflatten_dict({p: v for p, v in flatten_dict(state).items() if p not in paths})


def _with_sown(name: str, state: PyTree, train: Any) -> PyTree:
    """The state with places for all values sown in training."""
    after = jax.eval_shape(train, state)
    paths = _sown(state, after)
    made = flatten_dict(after).keys() - flatten_dict(state).keys() - paths
    if made:
        raise ValueError(
            f"{name}: makes the variable {'/'.join(min(made))} in apply and not in init; make it "
            "in both"
        )
    if not paths:
        return state
    fresh = flatten_dict(jax.eval_shape(train, _without(state, paths)))
    own = flatten_dict(_without(state, paths))
    for path in paths:
        own[path] = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), fresh[path])
    return unflatten_dict(own)
