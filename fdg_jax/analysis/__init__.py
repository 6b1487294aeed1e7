"""Simulated and recorded timelines, costs, and predictions of throughput."""

from fdg_jax.analysis.advice import Advice
from fdg_jax.analysis.advise import advise
from fdg_jax.analysis.costs import Costs
from fdg_jax.analysis.layer_times import LayerTimes, Setting
from fdg_jax.analysis.prediction import Measured, Row, crossing
from fdg_jax.analysis.recorder import Recorder
from fdg_jax.analysis.stage_bytes import StageBytes, stage_bytes
from fdg_jax.analysis.timeline import Event, Timeline
from fdg_jax.analysis.traffic import MessageBytes, message_bytes

__all__ = [
    "Advice",
    "Costs",
    "Event",
    "LayerTimes",
    "Measured",
    "MessageBytes",
    "Recorder",
    "Row",
    "Setting",
    "StageBytes",
    "Timeline",
    "advise",
    "crossing",
    "message_bytes",
    "stage_bytes",
]
