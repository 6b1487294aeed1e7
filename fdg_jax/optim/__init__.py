"""Optax transformations for stale gradients; each can be used alone.

    fdg_shrink                             first in a chain
    delay_compensation, gap_aware          first in a chain, or per gradient in a StageOptimizer
    scale_by_spike_compensation            instead of optax.trace
    scale_by_basis_rotation                instead of optax.scale_by_adam
    staleness_rate, stretched_momentum     rates and numbers
    error_feedback                         last in a chain
    predict_weights                        around a whole optimizer
    average_weights, averaged_params       around a whole optimizer; an average of the weights
    track_changes, past_params             around a whole optimizer; estimates earlier weights
    delayed_sgd                            SGD with prediction, stretched momentum, compensation
    recipes                                whole optimizers, tuned

Imports nothing from the rest of the library.
"""

from fdg_jax.optim import recipes
from fdg_jax.optim.average import (
    AverageState,
    average_weights,
    averaged_params,
    restarted_average,
)
from fdg_jax.optim.changes import ChangesState, past_params, track_changes
from fdg_jax.optim.compensation import (
    DelayCompensationState,
    GapAwareState,
    delay_compensation,
    gap_aware,
)
from fdg_jax.optim.displacement import Displacement, adam_displacement
from fdg_jax.optim.error_feedback import ErrorFeedbackState, error_feedback
from fdg_jax.optim.momentum import (
    Stretched,
    delayed_sgd,
    scale_by_spike_compensation,
    stretched_momentum,
)
from fdg_jax.optim.muon import muon_dimension_numbers
from fdg_jax.optim.prediction import (
    DelayedSGDState,
    PredictionState,
    predict_weights,
    true_params,
    without_prediction,
)
from fdg_jax.optim.rate import staleness_rate
from fdg_jax.optim.rotation import BasisRotationState, scale_by_basis_rotation
from fdg_jax.optim.shrink import ShrinkState, fdg_shrink
from fdg_jax.optim.stage_optimizer import StageOptimizer
from fdg_jax.optim.staleness import Staleness, updates_late

__all__ = [
    "AverageState",
    "BasisRotationState",
    "ChangesState",
    "DelayCompensationState",
    "DelayedSGDState",
    "Displacement",
    "ErrorFeedbackState",
    "GapAwareState",
    "PredictionState",
    "ShrinkState",
    "StageOptimizer",
    "Staleness",
    "Stretched",
    "adam_displacement",
    "average_weights",
    "averaged_params",
    "delay_compensation",
    "delayed_sgd",
    "error_feedback",
    "fdg_shrink",
    "gap_aware",
    "muon_dimension_numbers",
    "past_params",
    "predict_weights",
    "recipes",
    "restarted_average",
    "scale_by_basis_rotation",
    "scale_by_spike_compensation",
    "staleness_rate",
    "stretched_momentum",
    "track_changes",
    "true_params",
    "updates_late",
    "without_prediction",
]
