"""The same network in PyTorch."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil

import jax

from experiments.benchmarking import workload
from experiments.benchmarking.other_process import LeftOut, OtherProcess
from experiments.benchmarking.workload import Workload

PLAIN = re.compile(r"plain(\d+)")
WIDTH = 64


class Torch(OtherProcess):
    """Runs `experiments.benchmarking.torch_net` in turns.

    Its OpenMP threads spin after a turn (for at most 0.2 s), so it answers after they have stopped.
    No setting of threads is changed: it uses all cores, PyTorch's default.

    Args:
      name: as in --contenders.
      work: the workload; a plain network.

    Raises:
      LeftOut: torch cannot be imported, or has no such network.
    """

    def __init__(self, name: str, work: Workload) -> None:
        settings = work.settings
        plain = PLAIN.fullmatch(settings.model)
        if plain is None:
            raise LeftOut(f"{settings.model} is not written in PyTorch here, plain16 is")
        network = {
            "depth": int(plain[1]),
            "width": WIDTH,
            "channels": workload.CHANNELS,
            "classes": workload.CLASSES,
            "image_size": settings.image_size,
            "batch_size": settings.batch_size,
            "learning_rate": workload.LEARNING_RATE,
            "momentum": workload.MOMENTUM,
            "weight_decay": workload.WEIGHT_DECAY,
            "seed": settings.seed,
        }
        python = shutil.which(os.path.expanduser(settings.torch_python))
        program = pathlib.Path(__file__).with_name("torch_net.py")
        try:
            # -I: modules in the program's folder must not shadow torch's.
            super().__init__(name, [str(python), "-I", str(program), json.dumps(network)])
        except (RuntimeError, OSError) as error:
            raise LeftOut(f"{settings.torch_python} cannot run torch ({error})") from error
        self.about = (
            f"PyTorch {self.ready['torch']}, {self.ready['threads']} threads, "
            f"{self.ready['memory_format']}"
        )
        shapes = jax.eval_shape(work.split(1)[0].init, work.key, work.example)[0]
        expected = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        if self.ready["parameters"] != expected:
            self.close()
            raise RuntimeError(
                f"backprop_torch: trains {self.ready['parameters']} parameters, but "
                f"{settings.model} has {expected}: it is not the same network"
            )
