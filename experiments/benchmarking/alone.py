"""Stages without their neighbours: a lower bound for the time of a tick.

A stage alone shows the best possible time of the schedule. All stages at once, each on its own
device and without messages, show the effect of shared caches, memory and cores. Any further time
is overhead of the pipeline.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarking.contender import Piped
from fdg_jax.engine.dispatch import Tick
from fdg_jax.engine.state import PipelineState, Slots, scalar
from fdg_jax.schedule.action import ACTIVATION, COTANGENT
from fdg_jax.schedule.ledger import LABEL


class Alone:
    """The programs of one stage of FDG, dispatched as in a tick in steady state.

    Its state is a copy. The neighbours' messages are made beforehand, and its own messages stay on
    its device.

    Args:
      contender: a filled contender with a schedule in which no stage waits within a tick.
      k: the stage.
    """

    def __init__(self, contender: Piped, k: int) -> None:
        self.name, self.k = f"{contender.name} stage {k}", k
        pipe, state = contender.pipe, contender.state
        self.schedule = contender.schedule
        self.max_ahead = pipe.max_ahead
        self.last = k == pipe.num_stages - 1
        # Every neighbour is the stage itself, so messages need no transfer.
        self.programs = [pipe.stages[k]] * pipe.num_stages
        own = jax.tree.map(jnp.copy, state.stages[k])
        waiting = {port: slots.values[0] for port, slots in own.inbox.items()}
        self.inputs = contender.batch[0] if k == 0 else waiting[ACTIVATION]
        self.labels = contender.batch[1]
        self.cotangent = waiting.get(COTANGENT)
        # Neighbours are empty; messages to them are dropped at the end of the tick.
        none = Slots(np.zeros(0, np.int32), ())
        nothing = own._replace(
            params=(),
            model_state=(),
            opt_state=(),
            gradient=None,
            pending=scalar(0),
            flights=none,
            met=np.zeros(0, np.int32),
            versions=none,
            inbox={},
            record=None,
        )
        stages = [nothing] * pipe.num_stages
        stages[k] = own._replace(inbox={})
        self.state = PipelineState(state.tick, state.origin, state.key, tuple(stages))

    def prepare(self, steps: int) -> None:
        """Prepares the neighbours' messages for a number of ticks."""
        self.messages = [
            jax.tree.map(jnp.copy, (self.inputs, self.cotangent)) for _ in range(steps)
        ]
        self.tokens = collections.deque[list[jax.Array]]()
        jax.block_until_ready((self.messages, self.state))

    def tick(self) -> None:
        """Dispatches the stage's part of one tick; waits only beyond ``max_ahead`` ticks."""
        if len(self.tokens) >= self.max_ahead:
            jax.block_until_ready(self.tokens.popleft())
        inputs, cotangent = self.messages.pop()
        tick = Tick(self.programs, self.schedule, self.state)
        actions = [a for a in self.schedule.tick(tick.batch - tick.origin) if a.stage == self.k]
        own = tick.stages[self.k]
        for action in actions:
            n = action.batch + tick.origin
            if action.kind == "F":
                own.put(ACTIVATION, n, inputs)
                if self.last:
                    own.put(LABEL, n, self.labels)
            elif action.kind == "B" and not self.last:
                own.put(COTANGENT, n, cotangent)
        tick.run(actions)
        for k, other in enumerate(tick.stages):
            if k != self.k:
                other.inbox = {}
        self.state = tick.state(tick.batch + 1, tick.origin)
        self.tokens.append([program.token for program in tick.tokens()])


def turn(stages: Sequence[Alone], steps: int) -> float:
    """Runs the parts of some stages for a number of ticks, all at once; returns the seconds."""
    for stage in stages:
        stage.prepare(steps)
    start = time.perf_counter()
    for _ in range(steps):
        for stage in stages:
            stage.tick()
    jax.block_until_ready([stage.state for stage in stages])
    return time.perf_counter() - start
