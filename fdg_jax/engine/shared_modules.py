"""Warns if two layers use one module, since their parameters would drift apart."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from fdg_jax.layer import Layer, chain
from fdg_jax.nnx_adapter import FromModule
from fdg_jax.partition.network import units
from fdg_jax.repeat import Repeat
from fdg_jax.tie import Tie


def warn_of_shared(stages: Sequence[Layer], tie: Tie | None) -> None:
    """Warns of untied layers made from the same module.

    Args:
      stages: the network's stages.
      tie: the tied array, or None.
    """
    found: list[tuple[int, FromModule]] = []
    for number, layer in units(chain(stages)):
        numbers, inner = [number], layer
        if isinstance(layer, Repeat) and layer.layer is not None:
            inner = layer.layer
            numbers += [number + inner.size] * (layer.times > 1)
        if isinstance(inner, FromModule):
            found += [(n, inner) for n in numbers]
    if len(found) < 2:
        return
    known = {id(layer): layer.shared() for _, layer in found}
    told = {(tie.owner, tie.user)} if tie is not None else set()
    first: dict[int, int] = {}  # part of a module (by id) -> the first layer with it
    for number, layer in found:
        for part in known[id(layer)]:
            pair = first.setdefault(id(part), number), number
            if pair[0] != number and pair not in told:
                told.add(pair)
                warnings.warn(
                    f"layers {pair[0]} and {number} are made of one module; in a pipeline each "
                    "has parameters of its own, which drift apart. Tie an array of the two with "
                    f"Pipeline(tie=fdg.tie({pair[0]}, {number}, ...)), or make a module for each",
                    stacklevel=3,
                )
