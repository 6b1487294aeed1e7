"""The same network in PyTorch: a contender in a process of its own, which sleeps between turns."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import Any

import jax

from experiments import workload
from experiments.contender import Contender
from experiments.workload import Workload

PLAIN = re.compile(r"plain(\d+)")
WIDTH = 64


class Torch(Contender):
    """`experiments.torch_net`, told when it is its turn.

    Between turns it waits for a line of input. Its OpenMP threads spin for a moment after a turn
    (0.2 s at most, in the library that spins longest): the turn's answer comes only when they have
    stopped. Nothing about threads is set, so it runs as PyTorch does by default, on all cores.

    Args:
      name: as in --contenders.
      work: what is trained; a plain network.

    Raises:
      LeftOut: torch cannot be imported, or has no such network.
    """

    def __init__(self, name: str, work: Workload) -> None:
        self.name, self.devices = name, 1
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
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        # -I: our own modules, which lie beside the program, must not shadow torch's.
        self._process = subprocess.Popen(
            [str(python), "-I", str(program), json.dumps(network)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.processes = (self._process.pid,)
        self._loss = float("nan")
        self.settling_cpu_seconds: list[float] = []
        try:
            self.ready = self._answer()
        except RuntimeError as error:
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

    def turn(self, steps: int) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, and its answer says why
        answer = self._answer()
        self._loss = answer["loss"]
        self.settling_cpu_seconds.append(answer["settling_cpu_seconds"])
        return float(answer["seconds"])

    @property
    def loss(self) -> float:
        return self._loss

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        """The next line; raises `RuntimeError` with the last line of its errors where it ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:]
        self.close()
        raise RuntimeError(last[0] if last else f"status {self._process.returncode}")


class LeftOut(Exception):
    """Why a contender cannot take part here; no mistake of the user."""
