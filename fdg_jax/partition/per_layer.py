"""Labels by layer number or name in the network, for `optax.partition`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

import jax

from fdg_jax.partition.network import InStack
from fdg_jax.typing import PyTree

Rule: TypeAlias = Mapping[int | range | str, Hashable] | Callable[[int, str], Hashable]


def per_layer(rule: Rule, default: Hashable = "default") -> Callable[[PyTree], PyTree]:
    r"""Labels for `optax.partition` by layer, independent of K and the cuts.

    .. math::
        \text{label}(a) = \text{rule}(n, \text{name}), \qquad a \text{ an array of layer } n

    The optimizer of a stage sees the stage's params at their position in the network, as returned
    by `fdg_jax.partition.network.Place.whole`. Layers are numbered from the input, from 0; the
    equal layers of a `fdg_jax.repeat` count individually.

    Args:
      rule: a dictionary of labels, of which the first matching key is used: a layer's number, a
        ``range`` of numbers, or a name in the array's path, such as "bias". Or a function
        ``rule(n, name)`` of the layer's number and the array's path in it, such as
        "attention/kernel".
      default: the label of arrays without a matching key.

    Returns:
      A function of the params (a tuple with one entry per layer) or updates that returns their
      labels.

    Raises:
      ValueError: ``rule`` is neither. From the function: the params are not a tuple; a number or
        range matches no layer; layers of one `fdg_jax.repeat`, which share stacked arrays, get
        different labels.

    Example:
      >>> import optax
      >>> import fdg_jax as fdg
      >>> labels = fdg.per_layer({range(0, 2): "frozen"}, "trained")
      >>> labels(({"w": 0.0}, {"w": 0.0}, {"w": 0.0}))
      ({'w': 'frozen'}, {'w': 'frozen'}, {'w': 'trained'})
      >>> optimizer = optax.partition({"frozen": optax.set_to_zero(), "trained": optax.sgd(0.1)},
      ...                             labels)
    """

    if not (callable(rule) or isinstance(rule, Mapping)):
        raise ValueError(
            f"rule: is a {type(rule).__name__}; give a dictionary such as "
            '{range(0, 2): "frozen"}, or a function of number and name'
        )

    def of(number: int, name: str) -> Hashable:
        if callable(rule):
            return rule(number, name)
        for key, label in rule.items():
            if key in name.split("/") if isinstance(key, str) else _fits(key, number):
                return label
        return default

    def labels(params: PyTree) -> PyTree:
        if not isinstance(params, tuple):
            raise ValueError(
                f"params: are a {type(params).__name__}; per_layer needs a tuple with one entry "
                "per layer, as a Pipeline gives; in a loop of your own, make the params such a "
                "tuple"
            )

        if isinstance(rule, Mapping):
            for key in rule:
                if not isinstance(key, str) and not any(_fits(key, n) for n in range(len(params))):
                    raise ValueError(
                        f"rule: {key!r} fits no layer; the network has layers 0 to "
                        f"{len(params) - 1}"
                    )

        def one(path: jax.tree_util.KeyPath, leaf: Any) -> Hashable:
            del leaf
            number: int = path[0].idx
            name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            found = of(number, name)
            last = number
            while last + 1 < len(params) and isinstance(params[last + 1], InStack):
                last += 1
                if of(last, name) != found:
                    raise ValueError(
                        f"per_layer: {name or 'an array'} of layers {number} to {last} is one "
                        f"array of a repeat, with the labels {found!r} and {of(last, name)!r}; "
                        "write these layers out: [layer] * n in the place of repeat(layer, n)"
                    )
            return found

        return jax.tree_util.tree_map_with_path(one, params)

    return labels


def _fits(key: int | range, number: int) -> bool:
    return number in key if isinstance(key, range) else number == key
