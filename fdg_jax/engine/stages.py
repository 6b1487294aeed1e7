"""Builds the stages of a pipeline from its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from fdg_jax.engine.arguments import Optimizers, optimizer_of, places_of
from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.network_optimizer import NetworkOptimizer
from fdg_jax.engine.rules import stage_rule
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.synthesizer import Synthesizer
from fdg_jax.layer import Layer
from fdg_jax.schedule import Schedule
from fdg_jax.schedule.action import COTANGENT
from fdg_jax.typing import LossOfPart


def build(
    layers: Sequence[Layer],
    losses: Sequence[LossOfPart | None],
    optimizer: Optimizers,
    schedule: Schedule,
    meshes: Sequence[Mesh],
    rule: GradientRule,
    shard_optimizer: bool,
    synthesizers: Sequence[Synthesizer | None],
    message_dtype: np.dtype | None,
) -> list[Stage]:
    """One `Stage` per part of the network; see `Pipeline` for the arguments."""
    sends = any(name == COTANGENT for kind in schedule.kinds for name, hop in kind.gives if hop)
    stages: list[Stage] = []
    places = places_of(layers)
    for k, (place, mesh) in enumerate(zip(places, meshes, strict=True)):
        own = stage_rule(rule, schedule, k)
        given = own.optimizer(optimizer_of(optimizer, k, place.layers))
        stages.append(
            Stage(
                place.layer.at(place.start),
                NetworkOptimizer.at(place, given),
                mesh,
                start=place.start,
                rule=own,
                loss_fn=losses[k],
                last=k == len(layers) - 1,
                sends=sends and k > 0,
                shard_optimizer=shard_optimizer,
                synthesizer=synthesizers[k],
                message_dtype=message_dtype,
            )
        )
    return stages
