"""Layers into stages of equal cost: the optimal contiguous split."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.layer import Layer, PyTree, Repeat, chain, output_of, zeros_like

Cost = Literal["flops", "time"] | Sequence[float]


class Partition(list[Layer]):
    """K stages, and what the split is worth; an ordinary list of layers besides.

    Attributes:
      cuts: K-1 numbers; stage k+1 begins with layer ``cuts[k]`` (equal layers of a `repeat` counted
        one by one).
      unit: of the costs: "FLOPs" (also where the cuts were given), "seconds", or "" where the
        caller gave the costs.
      layers: how many layers there are to cut between.
    """

    def __init__(
        self,
        stages: Sequence[Layer],
        layers: int,
        cuts: Sequence[int],
        count_costs: Callable[[], Sequence[float]],
        unit: str,
    ) -> None:
        super().__init__(stages)
        self.layers = layers
        self.cuts = tuple(cuts)
        self._count_costs = count_costs
        self.unit = unit

    @functools.cached_property
    def layer_costs(self) -> tuple[float, ...]:
        """The cost of every layer; where the cuts were given, counted when first asked for."""
        return tuple(self._count_costs())

    @property
    def costs(self) -> tuple[float, ...]:
        """The cost of each stage."""
        edges = (0, *self.cuts, len(self.layer_costs))
        return tuple(sum(self.layer_costs[a:b]) for a, b in itertools.pairwise(edges))

    @property
    def balance(self) -> float:
        """Mean over largest stage cost: 1 where all are equal, 1/K where one has all of it."""
        largest = max(self.costs)
        return statistics.fmean(self.costs) / largest if largest else 1.0


def units_of(layers: Sequence[Layer]) -> list[Layer]:
    """The layers between which a split may cut: a `repeat` counts as its equal layers, a `chain` in
    the list as one."""
    units: list[Layer] = []
    for layer in layers:
        if isinstance(layer, Repeat):
            units += [layer.of(1)] * layer.times
        else:
            units.append(layer)
    return units


def partition(
    layers: Sequence[Layer],
    num_stages: int,
    example: PyTree,
    cost: Cost = "flops",
) -> Partition:
    r"""Splits layers into contiguous stages such that the slowest stage is as fast as can be.

    .. math::
        \min_{0 < c_1 < \dots < c_{K-1} < n} \; \max_k \sum_{i=c_k}^{c_{k+1}-1} w_i

    Found exactly, by dynamic programming; among the optimal splits the one with the smallest sum of
    squares is taken.

    Args:
      layers: the network, input first.
      num_stages: K, at most the number of layers.
      example: an input with its batch axis: arrays or ``jax.ShapeDtypeStruct``. FLOPs and time are
        taken at these shapes.
      cost: "flops": of forward and backward, as XLA counts them before it optimises; "time": of
        forward and backward, every distinct layer measured on the default device, median of 5; or
        one number per layer; or the K-1 cuts themselves.

    Returns:
      A list of K layers (each a `chain`) that also carries `cuts`, `costs` and `balance`.

    Raises:
      ValueError: K is not in 1..number of layers, or ``cost`` is none of the above.

    Example:
      >>> import jax.numpy as jnp
      >>> from fdg_jax import from_fn
      >>> stages = partition([from_fn(jnp.abs)] * 4, 2, jnp.ones((1, 3)), cost=[3, 1, 1, 1])
      >>> stages.cuts, stages.costs, stages.balance
      ((1,), (3.0, 3.0), 1.0)
    """
    if not layers:
        raise ValueError("layers=[]: there is nothing to split")
    units = units_of(layers)
    n = len(units)
    if not 1 <= num_stages <= n:
        raise ValueError(
            f"num_stages={num_stages}: this network has {n} layers that can be split, "
            f"so num_stages must be in 1..{n}"
        )
    unit, costs = "", []  # type: str, list[float]
    if isinstance(cost, str):
        if cost not in ("flops", "time"):
            raise ValueError(
                f'cost={cost!r}: allowed are "flops", "time", {n} costs, or {num_stages - 1} cuts'
            )
        unit = "FLOPs" if cost == "flops" else "seconds"
        costs = layer_costs(units, example, cost)
        if not any(costs):
            raise ValueError(
                f'cost="{cost}": every layer counts 0, so this cannot balance them; give the costs'
            )
    else:
        try:
            given = [float(value) for value in cost]
        except (TypeError, ValueError):
            raise ValueError(
                f'cost={cost!r}: allowed are "flops", "time", {n} costs, or {num_stages - 1} cuts'
            ) from None
        if len(given) == n:
            if not all(value >= 0 and np.isfinite(value) for value in given):
                raise ValueError(f"cost={list(cost)}: costs must be finite and >= 0")
            costs = given
        elif len(given) == num_stages - 1:
            cuts = [int(value) for value in given if np.isfinite(value)]
            edges = [0, *cuts, n]
            if cuts != given or any(a >= b for a, b in itertools.pairwise(edges)):
                raise ValueError(
                    f"cost={list(cost)}: cuts must be whole numbers that rise from 1 to {n - 1}"
                )
            count = functools.partial(layer_costs, units, example, "flops")
            return Partition(_stages(units, cuts), n, cuts, count, "FLOPs")
        else:
            raise ValueError(
                f"cost={list(cost)} has length {len(given)}: give {n} costs (one per layer) "
                f"or {num_stages - 1} cuts"
            )
    cuts = optimal_cuts(costs, num_stages)
    return Partition(_stages(units, cuts), n, cuts, lambda: costs, unit)


def optimal_cuts(costs: Sequence[float], num_stages: int) -> list[int]:
    """The cuts of the contiguous split with the smallest largest sum, then smallest squares.

    Args:
      costs: n numbers >= 0.
      num_stages: K in 1..n.

    Returns:
      K-1 positions in 1..n-1.

    Example:
      >>> optimal_cuts([1, 1, 1, 3], 2)
      [3]
    """
    prefix = np.concatenate([[0.0], np.cumsum(np.asarray(costs, float))])
    # First how small the largest sum can be, then the smallest squares under that limit; the two
    # at once would need more than one best split of every prefix. The limit has room for rounding.
    largest, _ = _best(prefix, num_stages, np.maximum, lambda sums: sums)
    limit = largest * (1 + 1e-12)
    _, cuts = _best(
        prefix, num_stages, np.add, lambda sums: np.where(sums <= limit, sums**2, np.inf)
    )
    return cuts


def _best(
    prefix: np.ndarray,
    num_stages: int,
    join: Callable[[np.ndarray, np.ndarray], np.ndarray],
    score: Callable[[np.ndarray], np.ndarray],
) -> tuple[float, list[int]]:
    """The smallest join of the stages' scores, and the cuts that give it: dynamic programming."""
    n = len(prefix) - 1
    best = np.array(score(prefix))  # of the first j layers in one stage
    best[0] = np.inf
    choices = []
    for _ in range(1, num_stages):
        new, choice = np.full(n + 1, np.inf), np.zeros(n + 1, int)
        for j in range(1, n + 1):
            joined = join(best[:j], score(prefix[j] - prefix[:j]))
            choice[j] = np.argmin(joined)
            new[j] = joined[choice[j]]
        best = new
        choices.append(choice)
    cuts, j = [], n
    for choice in reversed(choices):
        j = int(choice[j])
        cuts.append(j)
    return float(best[n]), cuts[::-1]


def layer_costs(units: Sequence[Layer], example: PyTree, cost: str) -> list[float]:
    """Forward plus backward cost of every layer, each distinct layer and shape looked at once.

    Args:
      units: layers, input first.
      example: the input of the first, arrays or ``jax.ShapeDtypeStruct``.
      cost: "flops" or "time".

    Returns:
      One number per layer: FLOPs, or seconds.
    """
    known: dict[Any, tuple[float, PyTree]] = {}
    costs = []
    x = jax.eval_shape(lambda v: v, example)
    for unit in units:
        # Equal layers of one repeat are the same inner object.
        inner = unit.layer if isinstance(unit, Repeat) else unit
        key = (
            id(inner),
            jax.tree.structure(x),
            tuple((v.shape, v.dtype) for v in jax.tree.leaves(x)),
        )
        if key not in known:
            assert inner is not None
            params, state = jax.eval_shape(functools.partial(_init, inner), x)
            measure = _flops if cost == "flops" else _seconds
            known[key] = measure(inner, params, state, x), output_of(inner, params, state, x)
        value, x = known[key]
        costs.append(value)
    return costs


def _init(layer: Layer, x: PyTree) -> tuple[PyTree, PyTree]:
    return layer.init(jax.random.key(0), x)


def _forward_backward(layer: Layer, params: PyTree, state: PyTree, x: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(x)
    inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def outputs(params: PyTree, moving: list[jax.Array]) -> list[jax.Array]:
        rest = iter(moving)
        full = [next(rest) if m else leaf for leaf, m in zip(leaves, inexact, strict=True)]
        key = jax.random.key(0)
        y, _ = layer.apply(params, state, jax.tree.unflatten(structure, full), train=True, key=key)
        return [leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    moving = [leaf for leaf, m in zip(leaves, inexact, strict=True) if m]
    y, vjp = jax.vjp(outputs, params, moving)
    return y, vjp(y)


def _flops(layer: Layer, params: PyTree, state: PyTree, x: PyTree) -> float:
    program = jax.jit(functools.partial(_forward_backward, layer))
    analysis = program.lower(params, state, x).cost_analysis()
    if not isinstance(analysis, dict):
        raise ValueError(
            'cost="flops": this platform does not count FLOPs; use cost="time", or give the costs'
        )
    return float(analysis.get("flops", 0.0))


def _seconds(layer: Layer, params: PyTree, state: PyTree, x: PyTree) -> float:
    arguments = jax.tree.map(lambda v: v + jnp.ones((), v.dtype), zeros_like((params, state, x)))
    program = jax.jit(functools.partial(_forward_backward, layer)).lower(*arguments).compile()
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _stages(units: Sequence[Layer], cuts: Sequence[int]) -> list[Layer]:
    edges = [0, *cuts, len(units)]
    stages = []
    for a, b in itertools.pairwise(edges):
        stage: list[Layer] = []
        for unit in units[a:b]:
            previous = stage[-1] if stage else None
            if (
                isinstance(unit, Repeat)
                and isinstance(previous, Repeat)
                and previous.layer is unit.layer
            ):
                stage[-1] = previous.of(previous.times + 1)
            else:
                stage.append(unit)
        stages.append(chain(stage))
    return stages
