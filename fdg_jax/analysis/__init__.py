"""What a schedule costs, and what a run did."""

from fdg_jax.analysis.costs import Costs
from fdg_jax.analysis.recorder import Recorder
from fdg_jax.analysis.timeline import Event, Timeline
from fdg_jax.analysis.traffic import MessageBytes, message_bytes

__all__ = ["Costs", "Event", "MessageBytes", "Recorder", "Timeline", "message_bytes"]
