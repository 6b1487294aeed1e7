"""Folders of runs, created quickly, for tests of exports."""

import jax
import numpy as np
from flax import linen, nnx

import fdg_jax as fdg
from experiments import data
from experiments.common import workdir
from experiments.images.settings import Settings
from experiments.images.task import Images
from experiments.training import setup
from experiments.training.loop import params_sha256
from fdg_jax.checkpoint import Checkpointer

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (24, 8, 8, 3), np.uint8)
LABELS = RNG.integers(0, 3, 24).astype(np.int32)
NAMES = ("cat", "dog", "ship")
DATASET = data.Dataset(
    "folder:images",
    IMAGES,
    LABELS,
    IMAGES,
    LABELS,
    NAMES,
    *map(np.float32, ([0.5] * 3, [0.25] * 3)),
)
X = data.normalise(IMAGES[:8], [0.5] * 3, [0.25] * 3)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(6)(x.reshape(len(x), -1))
        return linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.5)(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.dense(x)))


def create(name, num_classes=10, channels=3, unroll=None, compute=None, dropout=0.0):
    """Real models, and a small one of ordinary modules that compiles quickly."""
    if name != "tiny":
        return REAL(name, num_classes, channels, unroll, compute, dropout)
    block, head = fdg.from_nnx(Nnx), lambda rngs: nnx.Linear(6, num_classes, rngs=rngs)
    return [fdg.from_linen(Linen()), fdg.repeat(block, 4, unroll=unroll), fdg.from_nnx(head)]


REAL = fdg.models.create


def begin(folder, **settings):
    """A run's folder with its config.json; the run and its first state."""
    options = {"dataset": "folder:images", "batch_size": 8, "num_stages": 3, **settings}
    options.setdefault("partition", "2,4")
    run = setup.make(Images(Settings(str(folder), crop_padding=1, **options)))
    state = run.pipe.init(jax.random.key(0), X)
    described = setup.describe(run, setup.stage_table(run, run.pipe.params(state)))
    workdir.Workdir(str(folder), overwrite=False).write_json("config.json", described)
    return run, state


def save(folder, run, state, step):
    """Saves a checkpoint; returns predictions after it, and the hash of its parameters."""
    with Checkpointer(folder / "checkpoints", run.pipe) as checkpoints:
        checkpoints.save(state, step)
    return np.asarray(run.pipe.predict(state, X)), params_sha256(run.pipe.params(state))


def scattered(folder, **settings):
    """A checkpoint of random numbers, for networks that would take long to compile."""
    run, state = begin(folder, **settings)
    rng = np.random.default_rng(1)

    def scatter(leaf):
        moved = leaf + rng.uniform(0, 0.1, leaf.shape).astype(leaf.dtype)
        return jax.device_put(moved, leaf.sharding)

    stages = [
        s._replace(
            params=jax.tree.map(scatter, s.params), model_state=jax.tree.map(scatter, s.model_state)
        )
        for s in state.stages
    ]
    return save(folder, run, state._replace(stages=tuple(stages)), 7)
