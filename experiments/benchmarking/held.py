"""Bytes held by a stage: counted from its arrays, and predicted by the simulator.

Counted after every dispatched program of a tick; the peak is kept. A stage of FDG holds

    weights     the newest, and each older version used by a batch in flight
    optimizer   its state
    in flight   input and residuals of each batch between its forward and its backward

as predicted by the simulator, and in addition, not predicted: pending ``messages``, accumulated
``gradients``, and ``small`` data (batch statistics, labels, counters, synthesizers). If forward,
backward and update of a batch are one program (the last stage of FDG), the batch is never in flight
between programs: its residuals are temporary, and its input is a message until then. Temporary
values of programs are not counted; a backward that recomputes the forward has most.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarking.contender import Contender, Piped, Plain
from fdg_jax.analysis.costs import Costs
from fdg_jax.analysis.simulate import simulate
from fdg_jax.analysis.stage_bytes import is_plain, stage_bytes
from fdg_jax.engine.dispatch import Tick
from fdg_jax.engine.fusion import fuse
from fdg_jax.engine.state import StageWork
from fdg_jax.schedule.ledger import LABEL, METRIC
from fdg_jax.typing import PyTree

PREDICTED = ("weights", "optimizer", "in flight")
KINDS = (*PREDICTED, "messages", "gradients", "small")


class Counted(Tick):
    """A tick that counts the bytes of its messages."""

    sent = 0

    def send(self, tree: PyTree, k: int) -> PyTree:
        self.sent += sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        return super().send(tree, k)


def table(contender: Contender, ticks: int = 0) -> list[dict[str, Any]]:
    """Peak bytes of each stage, counted and predicted.

    Args:
      contender: a filled contender; trains on with copies of its batch, since real batches are
        different buffers.
      ticks: number of ticks to observe; 0: enough for one of every kind.

    Returns:
      A row per stage: bytes by kind when the sum of the predicted kinds is largest, and the bytes
      sent to other stages per mini-batch. A plain loop is one stage without prediction. Empty for
      contenders in other processes.
    """
    if isinstance(contender, Plain):
        state = contender.state
        small = [state.model_state, state.number]
        kinds = count([[state.params], [state.opt_state], [], [], [], small])
        return [_row(0, kinds, None, 0)]
    if not isinstance(contender, Piped):
        return []
    ticks = ticks or 2 * contender.stages + 2 * contender.schedule.period
    peaks = [dict.fromkeys(KINDS, 0)] * contender.stages
    sent = [0] * contender.stages
    pipe = contender.pipe
    for _ in range(ticks):
        tick = Counted(pipe.stages, contender.schedule, contender.state)
        tick.enter(*jax.tree.map(jnp.copy, contender.batch))
        actions = contender.schedule.tick(tick.batch - tick.origin)
        for group in fuse(actions, contender.schedule):
            k, before = group[0].stage, tick.sent
            tick.run(group)
            sent[k] += tick.sent - before
            kinds = bytes_of(tick.stages[k])
            if predicted_part(kinds) >= predicted_part(peaks[k]):
                peaks[k] = kinds
        contender.state = tick.state(tick.batch + 1, tick.origin)
        jax.block_until_ready(contender.state)
    predicted = predict(contender)
    return [_row(k, kinds, predicted[k], sent[k] // ticks) for k, kinds in enumerate(peaks)]


def bytes_of(stage: StageWork) -> dict[str, int]:
    """Bytes currently held by a stage, by kind; a shared buffer counts for the first kind."""
    stashes = [stash for _, stash in stage.flights.values()]
    messages = {port: list(there.values()) for port, there in stage.inbox.items()}
    small = [messages.pop(port, []) for port in (LABEL, METRIC)]
    return count(
        [
            [stage.params, stage.versions],
            [stage.opt_state],
            [(stash.inputs, stash.residuals) for stash in stashes],
            [messages],
            [stage.gradient],
            [stage.model_state, stage.number, small, stage.record, stage.synthesizer]
            + [(stash.model_state, stash.number, stash.labels) for stash in stashes],
        ]
    )


def count(groups: Sequence[Sequence[PyTree]]) -> dict[str, int]:
    """Bytes of distinct buffers on the device with most, for each of `KINDS`."""
    seen: set[tuple[int, int]] = set()
    return {
        kind: max(_new_bytes(jax.tree.leaves(trees), seen).values(), default=0)
        for kind, trees in zip(KINDS, groups, strict=True)
    }


def predict(contender: Piped) -> list[float]:
    """The simulator's prediction of each stage's peak, from shapes only."""
    pipe, schedule = contender.pipe, contender.schedule
    sizes = stage_bytes(pipe, contender.batch)
    inputs, residuals = list(sizes.inputs), list(sizes.residuals)
    steady = 8 * contender.stages * schedule.period
    ticks = [fuse(schedule.tick(steady + t), schedule) for t in range(schedule.period)]
    groups = list(itertools.chain(*ticks))
    for k in range(contender.stages):
        if all(len(group) == 3 for group in groups if group[0].stage == k):
            inputs[k] = residuals[k] = 0
    costs = Costs(
        forward=[1] * contender.stages,
        backward=[2] * contender.stages,
        input_bytes=inputs,
        kept_bytes=sizes.kept,
        residual_bytes=residuals,
        parameter_bytes=sizes.parameters,
    )
    run = simulate(schedule, costs, gradient=contender.gradient)
    # Optimizer states are added here, since the simulator uses one multiple of the weights for all
    # stages. It already includes the average of weight changes.
    optimizers = [
        size - own * stage.rule.estimates_weights
        for stage, size, own in zip(pipe.stages, sizes.optimizer, sizes.parameters, strict=True)
    ]
    return [run.peak_bytes(k) + optimizers[k] for k in range(contender.stages)]


def live() -> dict[str, int]:
    """Bytes of all live arrays, by device."""
    gc.collect()
    found = dict.fromkeys(map(str, jax.devices()), 0)
    for device, size in _new_bytes(jax.live_arrays(), set()).items():
        found[device] = size
    return found


def predicted_part(kinds: dict[str, int]) -> int:
    """The bytes of the predicted kinds."""
    return sum(kinds[kind] for kind in PREDICTED)


def _row(k: int, kinds: dict[str, int], predicted: float | None, sent: int) -> dict[str, Any]:
    return {
        "stage": k,
        "bytes": kinds,
        "measured": predicted_part(kinds),
        "predicted": None if predicted is None else round(predicted),
        "total": sum(kinds.values()),
        "sent": sent,
    }


def _new_bytes(leaves: Iterable[Any], seen: set[tuple[int, int]]) -> dict[str, int]:
    """Bytes by device of the buffers that are not in ``seen``; adds them to it."""
    found: dict[str, int] = {}
    for leaf in leaves:
        if not isinstance(leaf, jax.Array) or not is_plain(leaf) or leaf.is_deleted():
            continue
        for shard in leaf.addressable_shards:
            name = (shard.device.id, shard.data.unsafe_buffer_pointer())
            if name not in seen and shard.data.nbytes:
                seen.add(name)
                device = str(shard.device)
                found[device] = found.get(device, 0) + shard.data.nbytes
    return found
