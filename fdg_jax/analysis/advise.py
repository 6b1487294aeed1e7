"""Predicted speedup, memory and staleness of the methods for a network on given devices."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdg_jax.active_mesh import no_active_mesh
from fdg_jax.analysis.advice import Advice
from fdg_jax.analysis.layer_bench import part
from fdg_jax.analysis.layer_times import Setting, layer_times
from fdg_jax.analysis.prediction import Measured
from fdg_jax.analysis.stage_bytes import stage_bytes
from fdg_jax.engine.arguments import Optimizer
from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.engine.placement import Placed, put, stage_meshes
from fdg_jax.layer import Layer, output_of
from fdg_jax.layer_check import check_layers
from fdg_jax.partition import optimal_cuts, partition, units_of
from fdg_jax.schedule import backprop
from fdg_jax.shared import plain
from fdg_jax.typing import LossFn, PyTree

# Samples per message; the median is used.
MESSAGES = 21


@no_active_mesh()
def advise(
    layers: Sequence[Layer],
    example: tuple[PyTree, PyTree],
    devices: Sequence[jax.Device] | None = None,
    loss_fn: LossFn | None = None,
    optimizer: Optimizer | None = None,
    microbatches: int = 4,
    seconds: float = 20.0,
) -> Advice:
    """Predicts throughput, memory and staleness of the methods on 1 to D devices.

    The cuts follow from measured layers. Then the programs of the resulting stages and their
    messages are measured, and the simulator computes the throughput of back-propagation, data
    parallelism, 1F1B, DDG and FDG from these times. CPU devices share the cores of their machine,
    so for K stages a program is measured on K devices at once; other devices are measured one at a
    time.

    Args:
      layers: the network, input first.
      example: a mini-batch ``(inputs, labels)`` of arrays, or of ``jax.ShapeDtypeStruct``, which
        are replaced by random numbers and, for integers, zeros.
      devices: D devices; None: all of ``jax.devices()``.
      loss_fn: as in `fdg_jax.Pipeline`; None: the mean square of the outputs, without labels.
      optimizer: an optax transformation for all stages; None: SGD with momentum.
      microbatches: number of micro-batches of 1F1B.
      seconds: time for measuring after compilation; exceeded if 3 rounds take longer.

    Returns:
      The advice; ``print`` it.

    Raises:
      ValueError: invalid arguments, or layers that do not fit together.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fdg_jax as fdg
      >>> layers = [fdg.from_fn(jnp.tanh)] * 2
      >>> advice = advise(layers, (jnp.ones((4, 3)), None), jax.devices()[:2], seconds=0)
      >>> [(row.method, row.devices, row.staleness) for row in advice.rows]
      ... # doctest: +NORMALIZE_WHITESPACE
      [('backprop', 1, (0,)), ('backprop', 2, (0, 0)), ('data_parallel', 2, (0,)),
       ('one_f_one_b', 2, (0, 0)), ('ddg', 2, (1, 0)), ('fdg', 2, (2, 0))]
      >>> advice.recommendation.startswith(("Take", "Stay"))
      True
    """
    layers = check_layers(layers)
    if not layers:
        raise ValueError("layers=[]: there is nothing to advise on; give a list of layers")
    if not isinstance(example, tuple) or len(example) != 2:
        raise ValueError("example: must be (inputs, labels); labels may be None without a loss")
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches}: must be 1 or more; 4 is usual")
    chosen = list(jax.devices() if devices is None else devices)
    stage_meshes(1, chosen)  # rejects anything but a list of devices
    loss_fn = loss_fn or mean_square
    optimizer = optimizer or optax.sgd(1e-3, momentum=0.9)
    units = units_of(layers)
    batch = jax.tree.map(_array, example)
    size = max((leaf.shape[0] for leaf in jax.tree.leaves(plain(batch[0])) if leaf.ndim), default=1)

    # --- Settings to measure, and methods left out.
    notes = []
    stages = range(2, min(len(chosen), len(units)) + 1)
    if len(chosen) > len(units):
        notes.append(f"K above {len(units)}: the network has {len(units)} layers to cut between")
    sharing = [n for n in range(2, len(chosen) + 1) if size % n == 0]
    notes += [
        f"data_parallel on {n} devices: they do not divide a mini-batch of {size}"
        for n in range(2, len(chosen) + 1)
        if n not in sharing
    ]
    divided = size % microbatches == 0
    if stages and not divided:
        notes.append(f"one_f_one_b: {microbatches} parts do not divide a mini-batch of {size}")
    at_once = chosen[0].platform == "cpu"
    devices_at_work = {k: k if at_once else 1 for k in (1, *stages)}
    rest = batch, loss_fn, optimizer, chosen, seconds / 2
    settings = list(dict.fromkeys(Setting(pipelines=n) for n in devices_at_work.values()))
    (times,) = layer_times([(units, settings)], *rest)

    # --- The resulting stages and their messages.
    cuts, hops, sizes, shared = {}, {}, {}, {}
    networks: list[tuple[Sequence[Layer], list[Setting]]] = []
    for k, at_work in devices_at_work.items():
        its = times[Setting(pipelines=at_work)]
        costs = [f + b for f, b in zip(its.forward, its.backward, strict=True)]
        own_cuts = optimal_cuts(costs, k)
        made = partition(layers, k, plain(batch[0]), cost=own_cuts)
        wanted = [Setting(), Setting(pipelines=at_work)]
        wanted += [Setting(pipelines=at_work, parts=microbatches)] * (divided and k > 1)
        wanted += [Setting(shared_by=n) for n in sharing] * (k == 1)
        networks.append((made, list(dict.fromkeys(wanted))))
        pipe = Pipeline(made, loss_fn, optimizer, backprop(k), devices=chosen[:k])
        sizes[k] = stage_bytes(pipe, batch)
        if k > 1:
            cuts[k], hops[k] = tuple(own_cuts), _hops(pipe, plain(batch[0]))
    whole = Pipeline(
        [*partition(layers, 1, plain(batch[0]), cost=[])],
        loss_fn,
        optimizer,
        backprop(1),
        chosen[:1],
    )
    for n in sharing:
        shared[n] = stage_bytes(whole, part(batch, n))
    latency = 0.0
    if stages:
        smallest = message_seconds(np.zeros(1, np.float32), *chosen[:2])
        # The smallest message is the fastest; noise may have made another one faster.
        latency = min(smallest, *itertools.chain(*hops.values()))
    by_stages = dict(zip(devices_at_work, layer_times(networks, *rest), strict=True))
    measured = Measured(times, by_stages, cuts, hops, latency, sizes, shared, microbatches)
    return Advice.of(measured, notes)


def message_seconds(message: PyTree, source: jax.Device, target: jax.Device) -> float:
    """Seconds of a message from one device to another, until its arrival.

    Args:
      message: arrays.
      source, target: the devices.

    Returns:
      The median of 21 messages.
    """
    there, here = (Placed(mesh, False) for mesh in stage_meshes(2, [target, source]))
    sent = jax.block_until_ready(put(message, here.places(message)))
    places, found = there.places(message), []
    for _ in range(MESSAGES + 1):
        start = time.perf_counter()
        jax.block_until_ready(put(sent, places))
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])  # the first includes warm-up


def _hops(pipe: Pipeline, x: PyTree) -> tuple[float, ...]:
    """Seconds of a message of each stage's output to the next stage."""
    found = []
    devices = [stage.mesh.devices.flat[0] for stage in pipe.stages]
    for k, stage in enumerate(pipe.stages[:-1]):
        params, model_state, _ = stage.shapes(x)
        x = output_of(stage.layer, params, model_state, x)
        message = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), x)
        found.append(message_seconds(message, devices[k], devices[k + 1]))
    return tuple(found)


def _array(leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> jax.Array | np.ndarray:
    """An array for a shape; arrays are returned unchanged."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def mean_square(outputs: PyTree, labels: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The default loss, with a gradient for every output."""
    del labels
    leaves = [v for v in jax.tree.leaves(outputs) if jnp.issubdtype(v.dtype, jnp.inexact)]
    return sum((jnp.mean(jnp.square(v)) for v in leaves), start=jnp.zeros(())), {}
