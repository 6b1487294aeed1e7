"""The engine: stages on devices and the single thread that dispatches their programs."""

from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.engine.state import PipelineState

__all__ = ["Pipeline", "PipelineState"]
