"""Measured times of layers or stages, with the engine's programs: alone, side by side, on shared
batches.

    program     content                              used by
    forward     output and residuals                 stages before the last
    backward    gradients and update                 stages before the last
    together    forward, backward, update in one     the last stage, and back-propagation
    update      the optimizer alone                  after several backwards

With micro-batches no program includes an update, and "together" is not used.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from fdg_jax.analysis.layer_bench import LayerBench, Network
from fdg_jax.engine.arguments import Optimizer, losses_of
from fdg_jax.layer import Layer
from fdg_jax.schedule import backprop
from fdg_jax.typing import LossFn, PyTree

# Samples per program, as time permits; never fewer than the minimum.
ROUNDS, LEAST_ROUNDS = 21, 3
# A sample repeats a program for this long; a shorter one would measure dispatch.
SAMPLE_SECONDS, MOST_REPEATS = 0.01, 50
PROGRAMS = ("forward", "backward", "together", "update")


class Setting(NamedTuple):
    """Conditions under which a layer or stage is measured.

    Attributes:
      pipelines: number of devices that run it at once, each with its own mini-batch, like
        the stages of a pipeline.
      shared_by: number of devices that divide the mini-batch, as in data parallelism.
      parts: number of micro-batches of the mini-batch, of which one is measured.
    """

    pipelines: int = 1
    shared_by: int = 1
    parts: int = 1

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs used by a method in this setting; all, if the layer is measured alone."""
        if self.shared_by > 1:
            return ("together",)
        if self.parts > 1:
            return ("forward", "backward", "update")
        return PROGRAMS[:3] if self.pipelines > 1 else PROGRAMS


class LayerTimes(NamedTuple):
    """Seconds of every layer, or of every stage, in one setting.

    Attributes:
      forward, backward, together, update: as above, one number each; empty if no method uses
        the program in this setting.
    """

    forward: tuple[float, ...] = ()
    backward: tuple[float, ...] = ()
    together: tuple[float, ...] = ()
    update: tuple[float, ...] = ()


def layer_times(
    networks: Sequence[tuple[Sequence[Layer], Sequence[Setting]]],
    batch: tuple[PyTree, PyTree],
    loss_fn: LossFn,
    optimizer: Optimizer,
    devices: Sequence[jax.Device],
    seconds: float = 20.0,
) -> list[dict[Setting, LayerTimes]]:
    """Measures every distinct layer and shape; the loss is included in the last layer.

    All programs of all settings run in interleaved rounds, and the median of each counts, so
    changes of the machine's speed affect all of them equally.

    Args:
      networks: layers, input first, as returned by `fdg_jax.partition.units_of` or as the stages of
        a partition, and the settings in which they are measured.
      batch: inputs and labels, arrays.
      loss_fn: the network's loss function.
      optimizer: the optimizer of every layer.
      devices: at least as many as the settings require.
      seconds: time after which no further round starts; at least 3 and at most 21 rounds.

    Returns:
      For each network, times by setting.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from fdg_jax import from_fn
      >>> layers = [from_fn(jnp.tanh)] * 2
      >>> batch = jnp.ones((4, 3)), jnp.zeros((4, 3))
      >>> (found,) = layer_times([(layers, [Setting()])], batch,
      ...                        lambda y, t: (jnp.mean((y - t) ** 2), {}), optax.sgd(0.1),
      ...                        jax.devices(), seconds=0)
      >>> len(found[Setting()].forward), min(found[Setting()].together) > 0
      (2, True)
    """
    (loss,) = losses_of(loss_fn, backprop(1))
    runs: dict[Any, Callable[[], float]] = {}
    places: list[dict[Setting, list[int]]] = []
    for n, (units, settings) in enumerate(networks):
        network = Network(units, batch, loss, optimizer, devices)
        places.append({})
        for setting in settings:
            made, places[n][setting] = network.benches(*setting, "backward" in setting.programs)
            for i, benches in enumerate(made):
                for program in setting.programs:
                    key = n, setting, program, i
                    runs[key] = functools.partial(_sample, benches, program, [])
                    runs[key]()  # compiles
    samples: dict[Any, list[float]] = {key: [] for key in runs}
    began = time.perf_counter()
    for done in range(ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for key, run in runs.items():
            samples[key].append(run())
    median = {key: statistics.median(values) for key, values in samples.items()}
    return [
        {
            setting: LayerTimes(
                **{
                    program: tuple(median[n, setting, program, i] for i in indices)
                    for program in setting.programs
                }
            )
            for setting, indices in own.items()
        }
        for n, own in enumerate(places)
    ]


def _sample(benches: Sequence[LayerBench], program: str, repeats: list[int]) -> float:
    """Seconds of one program, run repeatedly on all devices at once."""
    if not repeats:
        # The first run compiles; the second determines the number of repeats.
        _run(benches, program, 1)
        seconds = _run(benches, program, 1)
        repeats.append(min(math.ceil(SAMPLE_SECONDS / seconds), MOST_REPEATS))
    return _run(benches, program, repeats[0])


def _run(benches: Sequence[LayerBench], program: str, repeats: int) -> float:
    if program == "update":
        for bench in benches:
            bench.gather(repeats)
    runs = [getattr(bench, program) for bench in benches]
    # Two concurrent programs on the same group of CPU devices can deadlock, so each is waited for.
    # The cost of waiting is measured with an empty program and subtracted.
    waits = benches[0].stage.mesh.size > 1
    seconds = _timed(runs, repeats, waits)
    if waits:
        token = benches[0].token
        seconds -= _timed([lambda: _empty(token)], repeats, waits)
    return max(seconds, 1e-9)


def _timed(runs: Sequence[Callable[[], PyTree]], repeats: int, waits: bool) -> float:
    """Seconds of one round of programs."""
    made: list[PyTree] = []
    start = time.perf_counter()
    for _ in range(repeats):
        made = [run() for run in runs]
        if waits:
            jax.block_until_ready(made)
    jax.block_until_ready(made)
    return (time.perf_counter() - start) / repeats


@jax.jit
def _empty(token: jax.Array) -> jax.Array:
    return token + 1
