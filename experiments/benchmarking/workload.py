"""The workload of a benchmark: network, batch and optimizer."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import shutil
import sys

import jax
import numpy as np
import optax

import fdg_jax as fdg
from experiments.benchmarking.model import CHANNELS, CLASSES, VOCABULARY, Sizes, load
from experiments.common.errors import UsageError
from experiments.common.machine import cores
from experiments.images.settings import DTYPES
from experiments.images.task import compute
from experiments.text.precision import computed_in
from experiments.training import family
from experiments.training.config import MESSAGE_DTYPES, blame
from experiments.training.methods import METHODS, Method
from fdg_jax.optim import Staleness, recipes
from fdg_jax.partition import Cost, units_of
from fdg_jax.schedule import Schedule

# So small that random labels cannot drive the weights anywhere: numbers that are not finite, or
# denormal, would be computed at another speed.
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 5e-4

ONE_DEVICE = re.compile(r"one_device_k([1-9]\d{0,3})(_dispatched)?")
# Methods run by the engine, with one stage per device.
PIPED = {
    **{name: own for name, own in METHODS.items() if not own.one_stage},
    "fdg_recompute_stale": Method("fdg", gradient="recompute_stale"),
    "fdg_recompute": Method("fdg", gradient="recompute"),
    "fdg_guarded": Method("fdg"),
    "fdg_saving": Method("fdg"),
    "fdg_recipe": Method("fdg"),
    "fdg_adamw": Method("fdg"),
    "fdg_adamw_recipe": Method("fdg"),
    "fdg_muon": Method("fdg"),
    "fdg_muon_recipe": Method("fdg"),
}
del PIPED["backprop"]  # is the plain loop here
# PyTorch's; the others' processes may use one core each.
TORCH = (
    "backprop_torch",
    "backprop_torch_one_core",
    "ddp_torch",
    "gpipe_torch",
    "one_f_one_b_torch",
    "zero_bubble_torch",
    "fdg_torch",
)
OTHER_PROCESSES = ("backprop_one_core", "backprop_untuned", "fdg_two_processes", *TORCH)
# PyTorch's pipelines, which divide a mini-batch into --microbatches.
MICROBATCHED = ("gpipe_torch", "one_f_one_b_torch", "zero_bubble_torch")
NAMES = ("backprop", "backprop_xla", "engine_k1", "data_parallel", *PIPED, *OTHER_PROCESSES)
ALLOWED = f"{', '.join(NAMES)}, one_device_k<K>, one_device_k<K>_dispatched"
DEFAULT = ("backprop", "engine_k1", "data_parallel", "gpipe", "one_f_one_b", "ddg", "fdg")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a benchmark; each field is the flag of that name."""

    workdir: str
    contenders: tuple[str, ...] = DEFAULT
    model: str = "plain16"
    image_size: int = 16
    batch_size: int = 32
    width: int = Sizes.width
    blocks: int = Sizes.blocks
    heads: int = Sizes.heads
    context: int = Sizes.context
    num_stages: int = 2
    microbatches: int = 4
    partition: str = "time"
    dtype: str = "float32"
    message_dtype: str = "float32"
    synthesizer_width: int = 128
    rounds: int = 5
    steps: int = 0
    turn_seconds: float = 3.0
    warmup_steps: int = 2
    max_load: float = 0.5
    torch_python: str = sys.executable
    seed: int = 0
    overwrite: bool = False

    def check(self) -> None:
        """Raises `UsageError` for the first invalid value."""
        if not self.workdir:
            raise UsageError("--workdir: is missing; name the folder for the results")
        sizes = [field.name for field in dataclasses.fields(Sizes)]
        bounds = dict.fromkeys([*sizes, "num_stages", "microbatches", "rounds"], 1)
        family.check(self.family)
        for name, least in {**bounds, "steps": 0, "warmup_steps": 0, "seed": 0}.items():
            if not least <= getattr(self, name) < 2**31:
                raise UsageError(f"--{name}={getattr(self, name)}: must be {least} or more")
        if not 0 < self.turn_seconds < math.inf:
            raise UsageError(f"--turn_seconds={self.turn_seconds}: must be above 0; 3 is usual")
        if not 0 <= self.max_load < math.inf:
            raise UsageError(f"--max_load={self.max_load}: must be 0 or more cores; 0.5 is usual")
        for name, allowed in (("dtype", DTYPES), ("message_dtype", MESSAGE_DTYPES)):
            if (value := getattr(self, name)) not in allowed:
                raise UsageError(
                    f"--{name}={value}: no such choice; allowed are {', '.join(allowed)}"
                )
        units = len(units_of(self.layers()))
        if self.num_stages > units:
            raise UsageError(
                f"--num_stages={self.num_stages}: {self.model} has {units} layers that can be "
                f"split, so choose 1 to {units}"
            )
        if not self.contenders:
            raise UsageError(f"--contenders=: give at least one of {ALLOWED}")
        for name in self.contenders:
            single = ONE_DEVICE.fullmatch(name)
            if not single and name not in NAMES:
                raise UsageError(f"--contenders={name}: no such contender; allowed are {ALLOWED}")
            if single and int(single[1]) > units:
                raise UsageError(
                    f"--contenders={name}: {self.model} has {units} layers that can be split, so "
                    f"choose one_device_k1 to one_device_k{units}"
                )
            parts = self.schedule(name).microbatches if name in PIPED else 1
            parts = self.microbatches if name in MICROBATCHED else parts
            if self.batch_size % parts:
                raise UsageError(
                    f"--microbatches={parts}: does not divide --batch_size={self.batch_size}, as "
                    f"{name} asks; choose one that does"
                )
        group = min(self.num_stages, cores())
        shared = [name for name in ("data_parallel", "ddp_torch") if name in self.contenders]
        if shared and self.batch_size % group:
            raise UsageError(
                f"--batch_size={self.batch_size}: does not divide over the {group} devices of "
                f"{shared[0]}; choose a multiple"
            )
        if self.partition not in ("time", "flops"):
            self._check_cuts(units)
        python = shutil.which(os.path.expanduser(self.torch_python))
        if python is None and (rows := [name for name in self.contenders if name in TORCH]):
            raise UsageError(
                f"--torch_python={self.torch_python}: is no program; name the Python that has "
                f"torch, or leave {rows[0]} out of --contenders"
            )

    def layers(self, fast_derivatives: bool = True) -> list[fdg.Layer]:
        """The layers of the network; with JAX's and XLA's derivatives only, where it has others.

        Raises:
          UsageError: there is no such network.
        """
        if self.model == "transformer":
            return computed_in(load(self.model, self.sizes).layers, self.dtype)
        with blame("model"):
            try:
                how = compute(self.dtype, fast_derivatives)
                return fdg.models.create(self.model, CLASSES, CHANNELS, compute=how)
            except ValueError as error:
                raise ValueError(f"{error}; or transformer") from error

    @property
    def sizes(self) -> Sizes:
        """Of the batch, and of the transformer."""
        return Sizes(*(getattr(self, field.name) for field in dataclasses.fields(Sizes)))

    @property
    def family(self) -> family.Family:
        """Settings of heads and synthesizers, for methods that have them."""
        return family.Family(synthesizer_width=self.synthesizer_width)

    def schedule(self, name: str) -> Schedule:
        """The schedule of a contender run by the engine."""
        options = {"microbatches": self.microbatches}
        return fdg.schedule.create(PIPED[name].schedule, self.num_stages, **options)

    def _check_cuts(self, units: int) -> None:
        remedy = f"give time, flops, or {self.num_stages - 1} layer numbers that rise in 1.."
        try:
            cuts = [int(part) for part in self.partition.split(",")]
        except ValueError:
            cuts = []
        edges = [0, *cuts, units]
        if len(cuts) != self.num_stages - 1 or sorted(set(edges)) != edges:
            raise UsageError(f"--partition={self.partition}: not understood; {remedy}{units - 1}")


class Workload:
    """Network, batch and optimizer of a benchmark.

    Args:
      settings: checked settings.

    Attributes:
      layers: of the network, input first.
      inputs, labels: numpy; random, the same for all. Images, or tokens.
      classes: size of the output.
      example: shapes of the inputs.
      layer_costs: of every layer that can be cut between, in `unit`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.layers = self.network()
        size = settings.image_size
        rng = np.random.default_rng(settings.seed)
        if settings.model == "transformer":
            shape: tuple[int, ...] = (settings.batch_size, settings.context)
            self.classes = VOCABULARY
            self.inputs: np.ndarray = rng.integers(VOCABULARY, size=shape, dtype=np.int32)
            self.labels = rng.integers(VOCABULARY, size=shape, dtype=np.int32)
        else:
            shape = (settings.batch_size, size, size, CHANNELS)
            self.classes = CLASSES
            self.inputs = rng.standard_normal(shape, np.float32)
            self.labels = rng.integers(CLASSES, size=settings.batch_size, dtype=np.int32)
        self.example = jax.ShapeDtypeStruct(self.inputs.shape, self.inputs.dtype)
        self.key = jax.random.key(settings.seed)
        self.unit = "seconds" if settings.partition == "time" else "FLOPs"

    def network(self, fast_derivatives: bool = True) -> list[fdg.Layer]:
        """The layers; or those whose derivatives are left to JAX and XLA."""
        return self.settings.layers(fast_derivatives)

    @functools.cached_property
    def layer_costs(self) -> tuple[float, ...]:
        cost: Cost = "time" if self.unit == "seconds" else "flops"
        # Measured once, so that all splits use the same costs.
        return fdg.partition(self.layers, 1, self.example, cost=cost).layer_costs

    def split(self, num_stages: int) -> fdg.Partition:
        """The network in K stages; given cuts only apply to --num_stages."""
        settings = self.settings
        costs: tuple[float, ...] = self.layer_costs if num_stages > 1 else ()
        if num_stages == settings.num_stages and settings.partition not in ("time", "flops"):
            costs = tuple(float(cut) for cut in settings.partition.split(","))
        return fdg.partition(self.layers, num_stages, self.example, cost=costs)

    def optimizer(self, name: str = "", late: Staleness = 0) -> optax.GradientTransformation:
        """A stage's optimizer: SGD with momentum and weight decay, or that of the contender."""
        recipe = name.endswith("_recipe")
        if name == "fdg_recipe":
            return recipes.sgd(LEARNING_RATE, late, MOMENTUM, WEIGHT_DECAY)
        if name.startswith("fdg_adamw"):
            return recipes.adamw(LEARNING_RATE, late, horizon=1.0 if recipe else None)
        if name.startswith("fdg_muon"):
            return recipes.muon(
                LEARNING_RATE, late, exclude="dense", horizon=1.0 if recipe else None
            )
        return optax.chain(
            optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
        )


def gradient(name: str) -> str:
    """The gradient rule of a contender run by the engine."""
    return PIPED[name].gradient or "stale"
