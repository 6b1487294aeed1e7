"""The same network in PyTorch, in one process or several."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

from experiments.benchmarking import workload
from experiments.benchmarking.model import CHANNELS
from experiments.benchmarking.other_process import LeftOut, OtherProcess, mean_loss
from experiments.benchmarking.workload import MICROBATCHED, Workload
from experiments.training.task import loss_fn
from fdg_jax import distributed
from fdg_jax.layer import batch_key
from fdg_jax.repeat import Repeat
from fdg_jax.typing import PyTree

PLAIN = re.compile(r"plain(\d+)")
WIDTH = 64
# Relative difference of the losses of the first step, which only rounding explains.
WITHIN = 1e-3
ABOUT = {
    "backprop_torch": "eager",
    "backprop_torch_one_core": "eager, in a process that may use one core",
    "ddp_torch": "DistributedDataParallel",
    "gpipe_torch": "GPipe of torch.distributed.pipelining",
    "one_f_one_b_torch": "1F1B of torch.distributed.pipelining",
    "zero_bubble_torch": "interleaved zero-bubble of torch.distributed.pipelining",
    "fdg_torch": "FDG",
}
ONE_PROCESS = ("backprop_torch", "backprop_torch_one_core")


class Torch(OtherProcess):
    """`experiments.peers`, with the initial weights and the mini-batch of the other contenders.

    `backprop_torch` runs as PyTorch does by default, on all cores; its OpenMP threads spin for a
    moment after a turn, and the turn's answer comes only when they have stopped. Every process of
    the others may use one core, each its own.

    Args:
      name: a key of `ABOUT`.
      work: what is trained; a plain network or the transformer.

    Raises:
      LeftOut: torch cannot be imported, or has no such network.
      RuntimeError: it is not the same network: parameters or the first loss differ.
    """

    def __init__(self, name: str, work: Workload) -> None:
        settings = work.settings
        python = shutil.which(os.path.expanduser(settings.torch_python))
        count = 1 if name in ONE_PROCESS else settings.num_stages
        cores = _cores(count)
        split = work.split(count if name not in ("ddp_torch", *ONE_PROCESS) else 1)
        edges = [0, *split.cuts, split.layers]
        whole = count == 1 or name == "ddp_torch"
        parts = settings.microbatches if name in MICROBATCHED else 1
        port = distributed.free_port()
        params, model_state = work.split(1)[0].init(work.key, work.example)
        with tempfile.TemporaryDirectory() as folder:
            arrays = arrays_of(work, params)
            _write(pathlib.Path(folder), arrays)
            common = {
                "name": name,
                "network": network(work),
                "folder": folder,
                "processes": count,
                "port": port,
                "microbatches": parts,
                "shapes": [] if whole else _shapes(work, split),
                "learning_rate": workload.LEARNING_RATE,
                "momentum": workload.MOMENTUM,
                "weight_decay": workload.WEIGHT_DECAY,
            }
            # -I: our own modules, which lie beside the program, must not shadow torch's.
            program = pathlib.Path(__file__).parent.parent / "peers" / "main.py"
            commands = []
            for rank in range(count):
                own = {
                    "rank": rank,
                    "core": None if name == "backprop_torch" else cores[rank],
                    "layers": [0, edges[-1]] if whole else edges[rank : rank + 2],
                }
                commands.append([str(python), "-I", str(program), json.dumps({**common, **own})])
            try:
                super().__init__(name, *commands)
            except (RuntimeError, OSError) as error:
                raise LeftOut(f"{settings.torch_python} cannot run torch ({error})") from error
        self.stages = 1 if whole else count
        first = self.ready[0]
        self.about = f"PyTorch {first['torch']}, {ABOUT[name]}, {first['threads']} threads"
        if count > 1:
            self.about = f"{self.about.rsplit(',', 1)[0]}, {count} processes of one core"
        try:
            self._check(work, params, model_state, count if name == "ddp_torch" else parts)
        except RuntimeError:
            self.close()
            raise

    def _check(self, work: Workload, params: PyTree, model_state: PyTree, parts: int) -> None:
        """Raises `RuntimeError` unless parameters and first loss are those of JAX's network."""
        expected = sum(leaf.size for leaf in jax.tree.leaves(params))
        found = self.ready[0]["parameters"]
        if found != expected:
            raise RuntimeError(
                f"{self.name}: trains {found} parameters, but {work.settings.model} has "
                f"{expected}: it is not the same network"
            )
        # Batch norm sees a part of the mini-batch where it is divided.
        own = np.split(work.inputs, parts), np.split(work.labels, parts)
        layer, key = work.split(1)[0], batch_key(work.key, 0)

        @jax.jit
        def loss(x: jax.Array, labels: jax.Array) -> jax.Array:
            outputs = layer.apply(params, model_state, x, train=True, key=key)[0]
            return loss_fn(outputs, labels)[0]

        wanted = float(np.mean([loss(*part) for part in zip(*own, strict=True)]))
        given = mean_loss(self.ready, "first_loss")
        if not abs(given - wanted) <= WITHIN * abs(wanted):
            raise RuntimeError(
                f"{self.name}: the loss of the first step is {given:.6g}, but {wanted:.6g} in JAX: "
                "it is not the same arithmetic"
            )


def network(work: Workload) -> dict[str, Any]:
    """The arguments of `experiments.peers.network.layers`.

    Raises:
      LeftOut: the model is not written in PyTorch, or not in this dtype.
    """
    settings = work.settings
    for name in ("dtype", "message_dtype"):
        if (value := getattr(settings, name)) != "float32":
            raise LeftOut(f"--{name}={value}: the networks in PyTorch compute and send float32")
    if settings.model == "transformer":
        names = ("model", "width", "blocks", "heads", "context")
        return {"classes": work.classes, **{name: getattr(settings, name) for name in names}}
    plain = PLAIN.fullmatch(settings.model)
    if plain is None:
        raise LeftOut(
            f"{settings.model} is not written in PyTorch here; plain16 and transformer are"
        )
    return {
        "model": settings.model,
        "depth": int(plain[1]),
        "width": WIDTH,
        "channels": CHANNELS,
        "classes": work.classes,
    }


def arrays_of(work: Workload, params: PyTree) -> dict[str, np.ndarray]:
    """The mini-batch, and the parameters by layer number and path."""
    arrays = {"inputs": work.inputs, "labels": work.labels}
    number = 0
    for layer, own in zip(work.layers, params, strict=True):
        times = layer.times if isinstance(layer, Repeat) else 1
        for path, leaf in jax.tree.leaves_with_path(own):
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            for i in range(times):
                value = leaf[i] if isinstance(layer, Repeat) else leaf
                arrays[f"{number + i}.{name}"] = np.asarray(value)
        number += times
    return arrays


def _write(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    index = {}
    for name, array in arrays.items():
        index[name] = [str(array.dtype), list(array.shape)]
        (folder / name).write_bytes(np.ascontiguousarray(array).tobytes())
    (folder / "index.json").write_text(json.dumps(index))


def _shapes(work: Workload, split: Any) -> list[list[int]]:
    """The shape of each stage's input; of images, channels before height and width."""
    found, x = [], work.example
    for stage in split:
        shape = list(x.shape)
        found.append([shape[0], shape[3], *shape[1:3]] if len(shape) == 4 else shape)
        params, state = jax.eval_shape(stage.init, work.key, x)
        x = jax.eval_shape(
            lambda p, s, x, stage=stage: stage.apply(p, s, x, train=True, key=work.key)[0],
            params,
            state,
            x,
        )
    return found


def _cores(count: int) -> list[int]:
    """The cores of processes.

    Raises:
      LeftOut: there are fewer, or this system does not hold a process to a core.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise LeftOut("this system does not hold a process to a core")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise LeftOut(f"{count} processes need a core each; there are {len(cores)}")
    return cores[-count:]
