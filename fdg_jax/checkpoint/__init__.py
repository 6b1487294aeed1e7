"""A training state to disk and back, and to another number of stages."""

from fdg_jax.checkpoint.checkpointer import Checkpointer
from fdg_jax.checkpoint.repartition import convert

__all__ = ["Checkpointer", "convert"]
