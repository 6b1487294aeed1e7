"""The programs of one layer, set up for repeated runs.

These are the engine's programs, with each layer as a stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fdg_jax.engine.arguments import Optimizer, optimizer_of
from fdg_jax.engine.gradient_rule import STALE
from fdg_jax.engine.network_optimizer import NetworkOptimizer
from fdg_jax.engine.placement import stage_meshes
from fdg_jax.engine.residuals import Stash, split_inexact
from fdg_jax.engine.stage import Stage
from fdg_jax.layer import Layer
from fdg_jax.partition.network import Place
from fdg_jax.repeat import Repeat
from fdg_jax.shared import is_shared, plain
from fdg_jax.typing import Key, LossOfPart, PyTree


def part(tree: PyTree, count: int) -> PyTree:
    """The first of ``count`` micro-batches."""

    def one(leaf: Any) -> PyTree:
        if is_shared(leaf) or not leaf.ndim:
            return plain(leaf)
        return leaf[: leaf.shape[0] // count]

    return jax.tree.map(one, tree, is_leaf=is_shared)


class LayerBench:
    """The programs of one layer on one group of devices, with their arguments.

    Args:
      stage: the layer as a stage.
      x: its input.
      labels: the batch's labels.
      output: the layer's output; None: computed by the forward.
      keeps: whether backwards will run, which need the residuals of a forward.
    """

    def __init__(
        self, stage: Stage, x: PyTree, labels: PyTree, output: PyTree, keeps: bool
    ) -> None:
        self.stage = stage
        self.x = jax.device_put(x, stage.places(x))
        self.labels = None
        if stage.loss_fn is not None:
            self.labels = jax.device_put(labels, stage.places(labels))
        self.params, self.model_state, self.opt_state = stage.init(jax.random.key(0), self.x)
        self.key, number = jax.device_put((jax.random.key(0), np.int32(0)), stage.replicated)
        # Every run consumes the token of the previous one: a CPU device could run two at a time.
        self.token = number
        self.output, self.message = output, None
        if output is None or keeps:
            made = self.forward()
            self.output, self.message = made.output, made.one
            self.stash = Stash(self.x, self.labels, self.model_state, number, made.residuals)
        if stage.loss_fn is None:
            message = split_inexact(self.output)[0]
            self.message = jax.device_put(message, stage.places(message))
        self.gradients: list[PyTree] = []
        self._together = jax.jit(self._in_one, donate_argnums=2)

    def forward(self) -> Any:
        own = self.params, self.model_state, self.x, self.labels
        made = self.stage.forward(*own, self.key, self.token, None)
        self.token = made.number
        return made

    def backward(self) -> PyTree:
        stash = self.stash._replace(number=self.token)
        fixed = stash, self.key, self.message, self.stage.number_on_device(0), None
        made = self.stage.backward_update(self.params, self.params, self.opt_state, *fixed)
        _, self.opt_state, _, self.token, _ = made
        return made

    def together(self) -> PyTree:
        fixed = self.x, self.labels, self.message, self.key, self.token
        made = self._together(self.params, self.model_state, self.opt_state, *fixed)
        _, self.opt_state, self.token, *_ = made
        return made

    def update(self) -> PyTree:
        # The token replaces the number of gradients, which does not affect the time.
        rest = self.gradients.pop(), self.token, None, None
        made = self.stage.update(self.params, self.opt_state, *rest, mean=True)
        _, self.opt_state, self.token, _ = made
        return made

    def gather(self, count: int) -> None:
        """Makes gradients for ``count`` updates, each of which consumes one."""
        copies = [jax.tree.map(jnp.copy, self.params) for _ in range(count)]
        self.gradients = jax.block_until_ready(copies)

    def _in_one(
        self,
        params: PyTree,
        model_state: PyTree,
        opt_state: PyTree,
        x: PyTree,
        labels: PyTree,
        message: PyTree,
        key: Key,
        number: jax.Array,
    ) -> PyTree:
        stage = self.stage
        made = stage.forward(params, model_state, x, labels, key, number, None)
        stash = Stash(x, labels, model_state, number, made.residuals)
        message = message if stage.loss_fn is None else made.one
        rest = opt_state, stash, key, message, jnp.float32(0), None
        new, new_opt, down, token, _ = stage.backward_update(params, params, *rest)
        return new, new_opt, token, down, made.output, made.report, made.model_state


class Network:
    """The layers with their inputs; Args as in `layer_times`."""

    def __init__(
        self,
        units: Sequence[Layer],
        batch: tuple[PyTree, PyTree],
        loss: LossOfPart | None,
        optimizer: Optimizer,
        devices: Sequence[jax.Device],
    ) -> None:
        self.units, self.batch, self.loss, self.devices = units, batch, loss, devices
        self.optimizer = STALE.optimizer(optimizer_of(optimizer, 0, range(0)))
        self.starts = list(itertools.accumulate((unit.size for unit in units), initial=0))
        # Outputs of the layers for the undivided mini-batch, by layer number.
        self.outputs: list[PyTree] = []

    def benches(
        self, pipelines: int, shared_by: int, parts: int, keeps: bool
    ) -> tuple[list[list[LayerBench]], list[int]]:
        """The benches of every distinct layer, and their index for every layer.

        Args:
          pipelines, shared_by, parts: as in `fdg_jax.analysis.Setting`.
          keeps: whether backwards will run.

        Returns:
          A list per distinct layer with a bench per pipeline, and an index per layer.
        """
        meshes = stage_meshes(pipelines, self.devices[: pipelines * shared_by])
        x, labels = part(self.batch, parts)
        outputs: list[PyTree] = []
        known: dict[Any, int] = {}
        made: list[list[LayerBench]] = []
        places = []
        for i, unit in enumerate(self.units):
            inner = unit.layer if isinstance(unit, Repeat) else unit
            shapes = tuple((v.shape, v.dtype) for v in jax.tree.leaves(x))
            last = i == len(self.units) - 1
            key = (id(inner), jax.tree.structure(x), shapes, i == 0, last)
            if key not in known:
                known[key] = len(made)
                output = self.outputs[i] if self.outputs and parts == 1 else None
                stages = [self.stage(i, mesh) for mesh in meshes]
                made.append([LayerBench(stage, x, labels, output, keeps) for stage in stages])
            places.append(known[key])
            x = made[known[key]][0].output
            outputs.append(x)
        if parts == 1:
            self.outputs = outputs
        return made, places

    def stage(self, i: int, mesh: Mesh) -> Stage:
        """A layer as a stage."""
        place = Place(self.units[i], self.starts[i], self.starts[-1])
        last = i == len(self.units) - 1
        return Stage(
            place.layer.at(place.start),
            NetworkOptimizer.at(place, self.optimizer),
            mesh,
            start=place.start,
            rule=STALE,
            loss_fn=self.loss if last else None,
            last=last,
            sends=i > 0,
        )
