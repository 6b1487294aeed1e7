"""The cost of a layer: FLOPs, or seconds on a device."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdg_jax.layer import Layer, output_of, zeros_like
from fdg_jax.partition.flops import flops
from fdg_jax.repeat import Repeat
from fdg_jax.typing import PyTree

# Samples per distinct layer within the time limit; slow layers need fewer.
ROUNDS = 15
LIMIT_SECONDS = 10.0


class _Part(NamedTuple):
    """A layer with its input shapes."""

    layer: Layer
    params: PyTree
    state: PyTree
    x: PyTree
    first: bool


def layer_costs(units: Sequence[Layer], example: PyTree, cost: str) -> list[float]:
    """Forward plus backward cost of every layer; each distinct layer and shape is evaluated once.

    Seconds are those of a layer alone, in training. All distinct layers run in interleaved rounds,
    up to 15 rounds or 10 s, so that interference affects all of them equally, and the fastest run
    of each counts, since interference can only add time. For the first layer the seconds exclude
    the gradient of the network's input, which no stage computes; the FLOPs include it.

    Args:
      units: layers, input first.
      example: the input of the first layer, arrays or ``jax.ShapeDtypeStruct``.
      cost: "flops" or "time".

    Returns:
      One number per layer: FLOPs, or seconds on the default device.

    Raises:
      ValueError: the platform does not count FLOPs.

    Example:
      >>> import jax.numpy as jnp
      >>> from fdg_jax import from_fn
      >>> first, second = layer_costs([from_fn(jnp.tanh)] * 2, jnp.ones((4, 3)), "time")
      >>> first > 0 and second > 0
      True
    """
    indices: dict[Any, int] = {}
    parts: list[_Part] = []
    outputs: list[PyTree] = []
    places = []
    # Without shardings: an example on a mesh of the program would carry that mesh along.
    x = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), jax.eval_shape(lambda v: v, example)
    )
    for place, unit in enumerate(units):
        # Equal layers of one repeat are the same inner object.
        inner = unit.layer if isinstance(unit, Repeat) else unit
        assert inner is not None
        first = cost == "time" and place == 0
        shapes = tuple((v.shape, v.dtype) for v in jax.tree.leaves(x))
        key = (id(inner), jax.tree.structure(x), shapes, first)
        if key not in indices:
            numbered = inner.at(place)
            params, state = jax.eval_shape(functools.partial(_init, numbered), x)
            indices[key] = len(parts)
            parts.append(_Part(inner, params, state, x, first))
            outputs.append(output_of(numbered, params, state, x))
        places.append(indices[key])
        x = outputs[indices[key]]
    costs = [_flops(part) for part in parts] if cost == "flops" else _seconds(parts)
    return [costs[index] for index in places]


def _init(layer: Layer, x: PyTree) -> tuple[PyTree, PyTree]:
    return layer.init(jax.random.key(0), x)


def _forward_backward(
    layer: Layer, first: bool, params: PyTree, state: PyTree, x: PyTree
) -> PyTree:
    leaves, structure = jax.tree.flatten(x)
    inexact = [not first and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def outputs(params: PyTree, moving: list[jax.Array]) -> list[jax.Array]:
        rest = iter(moving)
        full = [next(rest) if m else leaf for leaf, m in zip(leaves, inexact, strict=True)]
        key = jax.random.key(0)
        y, _ = layer.apply(params, state, jax.tree.unflatten(structure, full), train=True, key=key)
        return [leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    moving = [leaf for leaf, m in zip(leaves, inexact, strict=True) if m]
    y, vjp = jax.vjp(outputs, params, moving)
    return y, vjp(y)


def _flops(part: _Part) -> float:
    program = functools.partial(_forward_backward, part.layer, part.first)
    return flops(program, part.params, part.state, part.x)


def _seconds(parts: Sequence[_Part]) -> list[float]:
    programs = []
    for part in parts:
        shapes = (part.params, part.state, part.x)
        arguments = jax.tree.map(lambda v: v + jnp.ones((), v.dtype), zeros_like(shapes))
        jitted = jax.jit(functools.partial(_forward_backward, part.layer, part.first))
        programs.append((jitted.lower(*arguments).compile(), arguments))
    for program, arguments in programs:  # warm-up
        jax.block_until_ready(program(*arguments))
    # The minimum varied a fifth as much as the median beside one other busy program.
    best = [float("inf")] * len(programs)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for i, (program, arguments) in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            best[i] = min(best[i], time.perf_counter() - start)
        if time.perf_counter() - began > LIMIT_SECONDS:
            break
    return best
