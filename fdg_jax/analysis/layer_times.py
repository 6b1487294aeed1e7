"""What layers take, measured as the engine runs them: alone, side by side, and on shared batches.

    program     what                                 where a pipeline runs it
    forward     output and residuals                 stages below the last
    backward    gradients, and the update            stages below the last
    together    forward, backward, update in one     the last stage, and back-propagation
    update      the optimizer alone                  after several backwards

With micro-batches no program has an update in it, and "together" is not run.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from fdg_jax.analysis.layer_bench import LayerBench, Network
from fdg_jax.engine.arguments import Optimizer, losses_of
from fdg_jax.layer import Layer
from fdg_jax.schedule import backprop
from fdg_jax.typing import LossFn, PyTree

# Samples of every program, as far as the seconds suffice, but never fewer than the least.
ROUNDS, LEAST_ROUNDS = 21, 3
# A sample repeats a program until it has taken this long: a short one would measure its dispatch.
SAMPLE_SECONDS, MOST_REPEATS = 0.01, 50
PROGRAMS = ("forward", "backward", "together", "update")


class Setting(NamedTuple):
    """What else goes on while a layer is measured.

    Attributes:
      pipelines: so many devices run the layer at once, each with a mini-batch of its own, as the
        stages of a pipeline do.
      shared_by: so many devices share the mini-batch, as in data parallelism.
      parts: the mini-batch is divided into so many micro-batches, of which one is measured.
    """

    pipelines: int = 1
    shared_by: int = 1
    parts: int = 1

    @property
    def programs(self) -> tuple[str, ...]:
        """Those that a method runs in this setting; with nothing else going on, all."""
        if self.shared_by > 1:
            return ("together",)
        if self.parts > 1:
            return ("forward", "backward", "update")
        return PROGRAMS[:3] if self.pipelines > 1 else PROGRAMS


class LayerTimes(NamedTuple):
    """Seconds of every layer, in one setting.

    Attributes:
      forward, backward, together, update: as above, one number per layer; empty where no method
        runs the program in this setting.
    """

    forward: tuple[float, ...] = ()
    backward: tuple[float, ...] = ()
    together: tuple[float, ...] = ()
    update: tuple[float, ...] = ()


def layer_times(
    units: Sequence[Layer],
    batch: tuple[PyTree, PyTree],
    loss_fn: LossFn,
    optimizer: Optimizer,
    devices: Sequence[jax.Device],
    settings: Sequence[Setting],
    seconds: float = 20.0,
) -> dict[Setting, LayerTimes]:
    """Measures every distinct layer and shape; the loss counts to the last layer.

    All programs of all settings are run in turn, round after round, and the median of each counts,
    so that a machine that changes its speed does so to all of them.

    Args:
      units: layers, input first, as `fdg_jax.partition.units_of` gives them.
      batch: inputs and labels, arrays.
      loss_fn: of the network.
      optimizer: of every layer.
      devices: at least as many as the settings ask for.
      settings: which to measure.
      seconds: after which no further round begins, once there are 3; 21 rounds at most.

    Returns:
      Times by setting.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from fdg_jax import from_fn
      >>> layers = [from_fn(jnp.tanh)] * 2
      >>> batch = jnp.ones((4, 3)), jnp.zeros((4, 3))
      >>> found = layer_times(layers, batch, lambda y, t: (jnp.mean((y - t) ** 2), {}),
      ...                     optax.sgd(0.1), jax.devices(), [Setting()], seconds=0)
      >>> len(found[Setting()].forward), min(found[Setting()].together) > 0
      (2, True)
    """
    (loss,) = losses_of(loss_fn, backprop(1))
    network = Network(units, batch, loss, optimizer, devices)
    runs: dict[tuple[Setting, str, int], Callable[[], float]] = {}
    places: dict[Setting, list[int]] = {}
    for setting in settings:
        made, places[setting] = network.benches(*setting, "backward" in setting.programs)
        for i, benches in enumerate(made):
            for program in setting.programs:
                runs[setting, program, i] = functools.partial(_sample, benches, program, [])
                runs[setting, program, i]()  # compiles
    samples: dict[tuple[Setting, str, int], list[float]] = {key: [] for key in runs}
    began = time.perf_counter()
    for done in range(ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for key, run in runs.items():
            samples[key].append(run())
    median = {key: statistics.median(values) for key, values in samples.items()}
    return {
        setting: LayerTimes(
            **{
                program: tuple(median[setting, program, i] for i in places[setting])
                for program in setting.programs
            }
        )
        for setting in settings
    }


def _sample(benches: Sequence[LayerBench], program: str, repeats: list[int]) -> float:
    """Seconds of one program, run on all devices at once, over and over."""
    if not repeats:
        # The first run compiles, and the second tells how many make a sample.
        _run(benches, program, 1)
        seconds = _run(benches, program, 1)
        repeats.append(min(math.ceil(SAMPLE_SECONDS / seconds), MOST_REPEATS))
    return _run(benches, program, repeats[0])


def _run(benches: Sequence[LayerBench], program: str, repeats: int) -> float:
    if program == "update":
        for bench in benches:
            bench.gather(repeats)
    runs = [getattr(bench, program) for bench in benches]
    # Two programs under way on the same group of CPU devices can wait for each other for ever.
    # So each is waited for, which an empty program shows the cost of.
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
