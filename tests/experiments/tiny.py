"""A network that compiles quickly, for the tests of the benchmark."""

import jax
import jax.numpy as jnp
import numpy as np

import fdg_jax as fdg
from experiments.benchmarking import contender
from experiments.benchmarking.workload import Settings, Workload
from tests.networks import batch_norm, dense

QUIET = {"load_average": [0.1, 0.1, 0.1], "cores_of_others": 0.05}


def tiny_network(
    name: str, num_classes: int = 10, channels: int = 3, compute: object = None
) -> list[fdg.Layer]:
    del compute  # there is no convolution
    flat = fdg.from_fn(lambda x: x.reshape(len(x), -1))
    if name == "reversible":
        block = fdg.coupling(fdg.chain([dense(6), batch_norm()]))
        joined = fdg.from_fn(lambda streams: jnp.concatenate(streams, axis=-1))
        stem = [flat, dense(12), fdg.two_streams()]
        return [*stem, block, block, block, joined, dense(num_classes)]
    if name == "images":
        return [dense(5), flat, dense(num_classes)]
    if name != "tiny":
        raise ValueError(f"model={name!r}: no such model")
    return [flat, dense(12), batch_norm(), dense(7), batch_norm(), dense(num_classes)]


def made(settings: Settings, name: str, steps: int | None = None) -> contender.Contender:
    """A contender after its fill, or after ``steps``."""
    one = contender.make(name, Workload(settings))
    assert one.turn(one.fill + 2 if steps is None else steps) > 0
    return one


def params(one: contender.Contender) -> list[np.ndarray]:
    """All parameters in the order of the layers, independent of the cuts."""
    if isinstance(one, contender.Plain):
        return list(map(np.asarray, jax.tree.leaves(one.state.params)))
    return list(map(np.asarray, jax.tree.leaves(one.pipe.params(one.state))))
