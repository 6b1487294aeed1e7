"""What a schedule costs, and what a run did."""

from fdg_jax.analysis.costs import Costs
from fdg_jax.analysis.recorder import Recorder
from fdg_jax.analysis.timeline import Event, Timeline

__all__ = ["Costs", "Event", "Recorder", "Timeline"]
