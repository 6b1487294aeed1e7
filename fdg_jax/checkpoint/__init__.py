"""Saves and restores training states, and converts them to another number of stages."""

from fdg_jax.checkpoint.checkpointer import Checkpointer
from fdg_jax.checkpoint.repartition import convert

__all__ = ["Checkpointer", "convert"]
