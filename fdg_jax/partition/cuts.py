"""The optimal contiguous partition of layers into stages."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from fdg_jax.active_mesh import no_active_mesh
from fdg_jax.layer import Layer, chain
from fdg_jax.layer_check import check_layers
from fdg_jax.partition.layer_cost import layer_costs
from fdg_jax.repeat import Repeat
from fdg_jax.shared import plain
from fdg_jax.typing import PyTree

Cost = Literal["flops", "time"] | Sequence[float]


class Partition(list[Layer]):
    """A list of K stages with its cuts, costs and balance.

    Attributes:
      cuts: K-1 numbers; stage k+1 begins with layer ``cuts[k]`` (the layers of a `repeat` are
        counted individually).
      unit: the unit of the costs: "FLOPs" (also for given cuts), "seconds", or "" for given costs.
      layers: the number of layers between which cuts are possible.
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
        """The cost of every layer; computed on demand if the cuts were given."""
        return tuple(self._count_costs())

    @property
    def costs(self) -> tuple[float, ...]:
        """The cost of each stage."""
        edges = (0, *self.cuts, len(self.layer_costs))
        return tuple(sum(self.layer_costs[a:b]) for a, b in itertools.pairwise(edges))

    @property
    def balance(self) -> float:
        """Mean over largest stage cost: 1 if all are equal, 1/K if one stage has all of it."""
        largest = max(self.costs)
        return statistics.fmean(self.costs) / largest if largest else 1.0


def units_of(layers: Sequence[Layer]) -> list[Layer]:
    """The layers between which cuts are possible: a `repeat` counts as its equal layers, a `chain`
    in the list as one."""
    units: list[Layer] = []
    for layer in layers:
        if isinstance(layer, Repeat):
            units += [layer.of(1)] * layer.times
        else:
            units.append(layer)
    return units


@no_active_mesh()
def partition(
    layers: Sequence[Layer],
    num_stages: int,
    example: PyTree,
    cost: Cost = "flops",
) -> Partition:
    r"""Partitions layers into K contiguous stages, minimising the cost of the slowest stage.

    .. math::
        \min_{0 < c_1 < \dots < c_{K-1} < n} \; \max_k \sum_{i=c_k}^{c_{k+1}-1} w_i

    Solved exactly by dynamic programming; ties are broken by the smallest sum of squares.

    Args:
      layers: the network, input first.
      num_stages: K, at most the number of layers.
      example: an input with its batch axis: arrays or ``jax.ShapeDtypeStruct``. Costs are
        determined at these shapes.
      cost: "flops": FLOPs of forward and backward as counted by XLA before optimisation, with every
        iteration of a loop; "time": measured seconds of forward and backward of every distinct
        layer on the default device; or one number per layer; or the K-1 cuts.

    Returns:
      A list of K layers with the attributes `cuts`, `costs` and `balance`.

    Raises:
      ValueError: layers do not fit together, K is not in 1..number of layers, or ``cost`` is none
        of the above.

    Example:
      >>> import jax.numpy as jnp
      >>> from fdg_jax import from_fn
      >>> stages = partition([from_fn(jnp.abs)] * 4, 2, jnp.ones((1, 3)), cost=[3, 1, 1, 1])
      >>> stages.cuts, stages.costs, stages.balance
      ((1,), (3.0, 3.0), 1.0)
    """
    layers = check_layers(layers)
    if not layers:
        raise ValueError("layers=[]: there is nothing to split")
    units, example = units_of(layers), plain(example)
    n = len(units)
    if not isinstance(num_stages, int | np.integer):
        raise ValueError(
            f"num_stages: is a {type(num_stages).__name__}; give a whole number in 1..{n}, and the "
            "example after it"
        )
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
    """The contiguous partition with the smallest maximum, then the smallest sum of squares.

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
    # Minimises the largest sum first, then the squares under that limit: a joint search would need
    # more than one best split per prefix. The limit allows for the rounding of the prefix sums, a
    # few units in the last place of the total.
    largest, _ = _best(prefix, num_stages, np.maximum, lambda sums: sums)
    limit = largest + 4 * np.finfo(float).eps * prefix[-1]
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
    """The smallest joint score of the stages, and its cuts: dynamic programming."""
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
