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
      row: the method, number of devices and cuts.
      model: the model.
      loss_fn: its loss function.
      optimizer: the optimizer of every stage.
      microbatches: number of micro-batches of one_f_one_b.
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
        # Two concurrent steps on the same group of CPU devices can deadlock.
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
        self.turn(4 * self.pipe.num_stages)  # compiles and fills

    def turn(self, steps: int) -> float:
        """Trains, and waits for the devices at the end; returns seconds per step."""
        start = time.perf_counter()
        metrics = None
        for _ in range(steps):
            self.state, metrics = self.pipe.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - start) / steps


def rounds(
    turns: Sequence[Turns], count: int, turn_seconds: float, say: Callable[[str], None]
) -> list[list[float]]:
    """Mini-batches per second of each, round by round; the order rotates by one per round.

    Args:
      turns: the timed pipelines; all run the number of steps of the first one in a turn.
      count: number of rounds.
      turn_seconds: seconds of a turn of the first one.
      say: callback for progress messages.
    """
    steps = max(math.ceil(turn_seconds / turns[0].turn(2)), 2)
    found: list[list[float]] = [[] for _ in turns]
    for done in range(count):
        for i in range(len(turns)):
            place = (done + i) % len(turns)
            found[place].append(1 / turns[place].turn(steps))
        say(f"round {done + 1}/{count}, {steps} steps a turn")
    return found
