"""The pipeline at work: stages on devices, and the one thread that dispatches to them."""

from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.engine.state import PipelineState

__all__ = ["Pipeline", "PipelineState"]
