"""Fully decoupled training with delayed gradients (FDG) in JAX."""

from fdg_jax import models, preset, schedule, simulate
from fdg_jax.adapter import from_fn, from_linen, from_nnx
from fdg_jax.layer import Layer, chain, repeat
from fdg_jax.partition import Partition, partition
from fdg_jax.pipeline import Pipeline, PipelineState
from fdg_jax.shrink import fdg_shrink
from fdg_jax.version import __version__

__all__ = [
    "Layer",
    "Partition",
    "Pipeline",
    "PipelineState",
    "__version__",
    "chain",
    "fdg_shrink",
    "from_fn",
    "from_linen",
    "from_nnx",
    "models",
    "partition",
    "preset",
    "repeat",
    "schedule",
    "simulate",
]
