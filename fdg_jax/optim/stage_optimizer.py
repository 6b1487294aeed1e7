"""The optimizer of a stage: a part per gradient and a part per update."""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from fdg_jax.optim.transformation import transformation


class StageOptimizer(NamedTuple):
    """An optimizer in two parts, for schedules with gradient accumulation.

    Corrections that depend on the weights of a gradient's forward must be applied before gradients
    are summed. Without accumulation this equals ``optax.chain(per_gradient, per_update)``.

    Both receive the extra arguments ``stale_params``, the weights at which the gradient was
    computed, and ``staleness``, the number of updates since then, float32; ``per_update`` receives
    them only if an update has one gradient.

    Args:
      per_update: maps the reduced gradient to the update.
      per_gradient: maps one gradient to a corrected one; None: no correction.

    Example:
      >>> import optax
      >>> optimizer = StageOptimizer(optax.sgd(0.1), per_gradient=optax.clip(1.0))
      >>> state = optimizer.init({"w": 0.0})
      >>> len(state)
      2
    """

    per_update: optax.GradientTransformationExtraArgs
    per_gradient: optax.GradientTransformationExtraArgs | None = None

    @staticmethod
    def of(optimizer: Any) -> StageOptimizer:
        """Converts either form of an optimizer to two parts with extra arguments.

        Raises:
          ValueError: it is not an optimizer.
        """
        given = optimizer if isinstance(optimizer, StageOptimizer) else StageOptimizer(optimizer)
        remedy = (
            "give one, such as optax.sgd(0.1), or a function of the stage that returns one: "
            "lambda k: optax.sgd(0.1)"
        )
        return StageOptimizer(
            transformation(given.per_update, remedy),
            None if given.per_gradient is None else transformation(given.per_gradient, remedy),
        )

    def init(self, params: Any) -> Any:
        """Initialises the state: that of ``per_update``, or a pair of both."""
        state = self.per_update.init(params)
        return state if self.per_gradient is None else (self.per_gradient.init(params), state)

    def update(self, gradient: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        """One update from a corrected gradient.

        Args:
          gradient: the sum or mean.
          state: the state from `init` or the last update.
          params: the newest weights.
          **extra: see above.

        Returns:
          Updates and the new state.
        """
        if self.per_gradient is None:
            return self.per_update.update(gradient, state, params, **extra)
        first, own = state
        updates, own = self.per_update.update(gradient, own, params, **extra)
        return updates, (first, own)
