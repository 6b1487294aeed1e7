"""Reference of tied weights: one array used in two layers."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from fdg_jax.layer import Layer
from fdg_jax.tie import Borrowed, Tie
from fdg_jax.tied_stage import Tied, tied_stages
from fdg_jax.typing import PyTree


class Shared:
    """The array that two layers use.

    Args:
      stages: the network.
      tie: the tied array, or None.
    """

    def __init__(self, stages: Sequence[Layer], tie: Tie | None) -> None:
        self._transpose = tie is not None and tie.transpose
        self._tied = {
            k: stage for k, stage in enumerate(tied_stages(stages, tie)) if isinstance(stage, Tied)
        }
        self.owner = min(self._tied, default=-1)
        self.user = max(self._tied, default=-1)

    def array(self, params: PyTree) -> jax.Array | None:
        """The tied array from the params of the owner's stage, if the user is in another."""
        if self.owner == self.user:
            return None
        return self._tied[self.owner].lent(params).array

    def filled(self, params: Sequence[PyTree], lent: jax.Array | None) -> list[PyTree]:
        """All params with the array inserted where it is used."""

        def borrowed(node: object) -> bool:
            return isinstance(node, Borrowed)

        found = list(params)
        if not self._tied:
            return found
        if lent is None:
            lent = self._tied[self.owner].lent(params[self.owner]).array
        array = lent.T if self._transpose else lent
        found[self.user] = jax.tree.map(
            lambda v: array if borrowed(v) else v, params[self.user], is_leaf=borrowed
        )
        return found

    def sum(self, gradient: PyTree, lent: jax.Array) -> PyTree:
        """Adds the gradient of the array's other use to that of the owner's stage."""
        own = self.array(gradient)
        return jax.tree.map(lambda v: v + lent if id(v) == id(own) else v, gradient)
