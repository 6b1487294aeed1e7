"""A stage's optimizer that sees the parameters at their position in the network."""

from __future__ import annotations

from typing import Any

import optax

from fdg_jax.optim import (
    StageOptimizer,
    averaged_params,
    restarted_average,
    true_params,
    without_prediction,
)
from fdg_jax.partition.network import Place
from fdg_jax.typing import PyTree


class NetworkOptimizer(StageOptimizer):
    """Applies an optimizer of network trees to the trees of a stage.

    Its state contains trees as made by `fdg_jax.partition.network.Place.whole`.

    Attributes:
      given: the optimizer of network trees.
      place: the stage's position in the network.
    """

    given: StageOptimizer
    place: Place

    @staticmethod
    def at(place: Place, given: StageOptimizer) -> NetworkOptimizer:
        """The optimizer of a stage.

        Args:
          place: the stage's position in the network.
          given: the optimizer of network trees.
        """
        parts = [part if part is None else _at(place, part) for part in given]
        made = NetworkOptimizer(*parts)
        made.given, made.place = given, place
        return made

    def true_params(self, params: PyTree, opt_state: optax.OptState) -> PyTree:
        """See `fdg_jax.true_params`; for a stage's params."""
        return self.place.own(true_params(self.place.whole(params), opt_state))

    def averaged_params(self, params: PyTree, opt_state: optax.OptState) -> PyTree:
        """See `fdg_jax.averaged_params`; for a stage's params."""
        return self.place.own(averaged_params(self.place.whole(params), opt_state))

    def restarted(self, new: PyTree, params: PyTree, opt_state: optax.OptState) -> optax.OptState:
        """The state for other weights, with predictions and averages restarted.

        Args:
          new: the stage's new true weights.
          params, opt_state: the old params and state.
        """
        _, opt_state = without_prediction(self.place.whole(params), opt_state)
        return restarted_average(self.place.whole(new), opt_state)

    def without_prediction(
        self, params: PyTree, opt_state: optax.OptState
    ) -> tuple[PyTree, optax.OptState]:
        """See `fdg_jax.optim.without_prediction`; for a stage's params."""
        params, opt_state = without_prediction(self.place.whole(params), opt_state)
        return self.place.own(params), opt_state


def _at(
    place: Place, given: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    def init(params: optax.Params) -> optax.OptState:
        return given.init(place.whole(params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if "stale_params" in extra_args:
            extra_args["stale_params"] = place.whole(extra_args["stale_params"])
        seen = params if params is None else place.whole(params)
        updates, state = given.update(place.whole(updates), state, seen, **extra_args)
        return place.own(updates), state

    return optax.GradientTransformationExtraArgs(init, update)
