"""Interleaved training of one network with the predicted methods."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import jax
import optax

import fdg_jax as fdg
from experiments.benchmarking.model import Model
from fdg_jax import methods
from fdg_jax.analysis.prediction import Row
from fdg_jax.shared import plain
from fdg_jax.typing import LossFn


class Turns:
    """A pipeline that stays filled between its turns.

    Args:
      row: which method, on how many devices, cut where.
      model: what is trained.
      loss_fn: of the network.
      optimizer: of every stage.
      microbatches: of one_f_one_b.
    """

    def __init__(
        self,
        row: Row,
        model: Model,
        loss_fn: LossFn,
        optimizer: optax.GradientTransformation,
        microbatches: int,
    ) -> None:
        options = {"microbatches": microbatches} if row.method == "one_f_one_b" else {}
        made = methods.create(row.method, row.devices, **options)
        inputs = plain(model.batch[0])
        stages = fdg.partition(
            model.layers, made["schedule"].num_stages, inputs, cost=list(row.cuts)
        )
        devices = jax.devices()[: row.devices]
        # Two steps under way on the same group of CPU devices can wait for each other for ever.
        ahead = 1 if row.method == "data_parallel" else 4
        self.pipe = fdg.Pipeline(
            stages, loss_fn, optimizer, devices=devices, max_ahead=ahead, **made
        )
        self.state = self.pipe.init(jax.random.key(0), *model.batch)
        first, last = self.pipe.stages[0], self.pipe.stages[-1]
        x, labels = model.batch
        self.batch = (
            jax.device_put(x, first.places(x)),
            jax.device_put(labels, last.places(labels)),
        )
        self.turn(4 * self.pipe.num_stages)  # compiles, and fills

    def turn(self, steps: int) -> float:
        """Trains, and waits for the devices at the end; returns seconds a step."""
        start = time.perf_counter()
        metrics = None
        for _ in range(steps):
            self.state, metrics = self.pipe.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - start) / steps


def rounds(
    turns: Sequence[Turns], count: int, turn_seconds: float, say: Callable[[str], None]
) -> list[list[float]]:
    """Mini-batches a second of each, round by round; who begins moves on by one.

    Args:
      turns: who is timed; all do as many steps as the first does in a turn's seconds.
      count: of rounds.
      turn_seconds: of the first's turn.
      say: told how far it is.
    """
    steps = max(math.ceil(turn_seconds / turns[0].turn(2)), 2)
    found: list[list[float]] = [[] for _ in turns]
    for done in range(count):
        for i in range(len(turns)):
            place = (done + i) % len(turns)
            found[place].append(1 / turns[place].turn(steps))
        say(f"round {done + 1}/{count}, {steps} steps a turn")
    return found
