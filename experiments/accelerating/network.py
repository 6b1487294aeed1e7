"""The networks whose steps are timed, as workloads of the benchmark."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import optax

import fdg_jax as fdg
from experiments.benchmarking.model import Sizes
from experiments.benchmarking.workload import Settings, Workload
from fdg_jax.optim import Staleness, recipes

# Small, since labels are random.
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Network:
    """A network, its batch, and the expected time of a timed case.

    Attributes:
      model: a name of `fdg_jax.models.create`, or "transformer".
      sizes: sizes of its batch and of the transformer.
      expected: expected seconds of a process that compiles and times it.
    """

    model: str
    sizes: Sizes
    expected: float = 60.0

    @property
    def about(self) -> str:
        """Its size as text."""
        own = self.sizes
        if self.model != "transformer":
            return f"{own.image_size}x{own.image_size}, batch {own.batch_size}, SGD"
        blocks = f"{own.blocks} blocks of width {own.width}"
        return f"{blocks}, {own.context} bytes, batch {own.batch_size}, AdamW"


_IMAGES = Sizes(batch_size=128, image_size=32)
NETWORKS = {
    "resnet20": Network("resnet20", _IMAGES),
    "transformer": Network(
        "transformer", Sizes(batch_size=8, width=768, blocks=12, heads=12, context=1024), 90.0
    ),
    "resnet56": Network("resnet56", _IMAGES),
    "wrn28_10": Network("wrn28_10", _IMAGES, 90.0),
    "resnet110": Network("resnet110", _IMAGES, 90.0),
    "resnet1202": Network("resnet1202", _IMAGES, 180.0),
}
# For rehearsals.
TINY = {
    "small_resnet": Network("small_resnet", Sizes(batch_size=4, image_size=8), 10.0),
    "transformer": Network(
        "transformer", Sizes(batch_size=2, width=16, blocks=2, heads=2, context=8), 10.0
    ),
}


class Text(Workload):
    """The transformer on random bytes, with AdamW."""

    def optimizer(self, name: str = "", late: Staleness = 0) -> optax.GradientTransformation:
        return recipes.adamw(LEARNING_RATE, late)


def workload(network: Network, dtype: str, seed: int = 0) -> Workload:
    """A network with a random batch; stages are equal in FLOPs."""
    settings = Settings(
        workdir="",
        model=network.model,
        **dataclasses.asdict(network.sizes),
        num_stages=1,
        partition="flops",
        dtype=dtype,
        seed=seed,
    )
    return Text(settings) if network.model == "transformer" else Workload(settings)


def parameters(work: Workload) -> int:
    """The number of parameters of a network."""
    init = fdg.chain(work.layers).init
    params, _ = jax.eval_shape(init, work.key, work.example)
    return sum(leaf.size for leaf in jax.tree.leaves(params))
