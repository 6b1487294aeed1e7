"""Errors that end training: a failed stage, a non-finite value, a consumed state."""


class StageError(RuntimeError):
    """A stage failed; the message names the stage, its layers and the mini-batch.

    Attributes:
      stage: number of the stage.
      batch: number of the mini-batch.
    """

    def __init__(self, message: str, stage: int, batch: int) -> None:
        super().__init__(message)
        self.stage = stage
        self.batch = batch


class NonFiniteError(StageError):
    """A loss, gradient, output or model state was NaN or infinite."""


class ConsumedStateError(ValueError):
    """A state was used again after `step` or `drain` had consumed it."""

    def __init__(self) -> None:
        super().__init__(
            "state: was consumed by an earlier step or drain; go on with the state that it "
            "returned, or copy one before with jax.tree.map(jnp.copy, state)"
        )
