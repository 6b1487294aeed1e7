"""Fully decoupled training with delayed gradients (FDG) in JAX."""

from fdg_jax import methods, models, optim, schedule
from fdg_jax.adapters import from_equinox, from_fn, from_linen, from_nnx
from fdg_jax.analysis import simulate
from fdg_jax.engine import Pipeline, PipelineState
from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.messages import Metrics
from fdg_jax.engine.synthesizer import Synthesizer
from fdg_jax.errors import ConsumedStateError, NonFiniteError, StageError
from fdg_jax.head import with_head
from fdg_jax.layer import Layer, chain
from fdg_jax.optim import (
    StageOptimizer,
    average_weights,
    averaged_params,
    delay_compensation,
    delayed_sgd,
    error_feedback,
    fdg_shrink,
    gap_aware,
    past_params,
    predict_weights,
    recipes,
    scale_by_basis_rotation,
    scale_by_spike_compensation,
    staleness_rate,
    stretched_momentum,
    track_changes,
    true_params,
)
from fdg_jax.partition import Partition, partition, per_layer
from fdg_jax.repeat import repeat
from fdg_jax.reversible import coupling, reversible, two_streams
from fdg_jax.sequence import layers_of
from fdg_jax.shared import shared
from fdg_jax.tie import tie
from fdg_jax.version import __version__

__all__ = [
    "ConsumedStateError",
    "GradientRule",
    "Layer",
    "Metrics",
    "NonFiniteError",
    "Partition",
    "Pipeline",
    "PipelineState",
    "StageError",
    "StageOptimizer",
    "Synthesizer",
    "__version__",
    "average_weights",
    "averaged_params",
    "chain",
    "coupling",
    "delay_compensation",
    "delayed_sgd",
    "error_feedback",
    "fdg_shrink",
    "from_equinox",
    "from_fn",
    "from_linen",
    "from_nnx",
    "gap_aware",
    "layers_of",
    "methods",
    "models",
    "optim",
    "partition",
    "past_params",
    "per_layer",
    "predict_weights",
    "recipes",
    "repeat",
    "reversible",
    "scale_by_basis_rotation",
    "scale_by_spike_compensation",
    "schedule",
    "shared",
    "simulate",
    "staleness_rate",
    "stretched_momentum",
    "tie",
    "track_changes",
    "true_params",
    "two_streams",
    "with_head",
]
