"""The networks whose steps are timed, as workloads of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

import fdg_jax as fdg
from experiments.benchmarking.model import Sizes, load
from experiments.benchmarking.workload import Settings, Workload
from fdg_jax.layer import Layer
from fdg_jax.optim import Staleness, recipes
from fdg_jax.repeat import Repeat
from fdg_jax.typing import Key, PyTree

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
    """The transformer on random bytes, with AdamW.

    Args:
      settings: settings of the benchmark; only dtype and seed are used.
      sizes: sizes of network and batch.
    """

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        self.settings = settings
        model = load("transformer", sizes)
        self.layers = computed_in(model.layers, settings.dtype)
        self.images, self.labels = model.batch
        self.example = jax.ShapeDtypeStruct(self.images.shape, jnp.int32)
        self.key = jax.random.key(settings.seed)
        self.unit = "FLOPs"

    def network(self, fast_derivatives: bool = True) -> list[Layer]:
        del fast_derivatives  # there are no custom derivatives
        return self.layers

    def optimizer(self, name: str = "", late: Staleness = 0) -> optax.GradientTransformation:
        return recipes.adamw(LEARNING_RATE, late)


def workload(network: Network, dtype: str, seed: int = 0) -> Workload:
    """A network with a random batch; stages are equal in FLOPs."""
    own = network.sizes
    settings = Settings(
        workdir="",
        model=network.model,
        image_size=own.image_size,
        batch_size=own.batch_size,
        num_stages=1,
        partition="flops",
        dtype=dtype,
        seed=seed,
    )
    return Text(settings, own) if network.model == "transformer" else Workload(settings)


def computed_in(layers: Sequence[Layer], dtype: str) -> list[Layer]:
    """Layers that compute in ``dtype`` with float32 parameters; the last returns float32.

    Args:
      layers: a transformer, whose activations have the dtype of the parameters.
      dtype: "float32" or "bfloat16".
    """
    if dtype == "float32":
        return list(layers)
    *inner, last = (_cast(layer, dtype) for layer in layers)
    return [*inner, fdg.chain([last, fdg.from_fn(lambda x: x.astype(jnp.float32))])]


def _cast(layer: Layer, dtype: str) -> Layer:
    if isinstance(layer, Repeat) and layer.layer is not None:
        return fdg.repeat(_cast(layer.layer, dtype), layer.times, unroll=layer.unroll)

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        return layer.apply(optax.tree.cast(params, dtype), state, x, train=train, key=key)

    return Layer(layer.init, apply)


def parameters(work: Workload) -> int:
    """The number of parameters of a network."""
    init = fdg.chain(work.layers).init
    params, _ = jax.eval_shape(init, work.key, work.example)
    return sum(leaf.size for leaf in jax.tree.leaves(params))
