"""The weights in a checkpoint, read without the pipeline."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.checkpoint import Checkpointer, manifest, weights
from tests import networks

DATA = networks.batches(3)
X = DATA[0][0]


def cut(*cuts, width=networks.CLASSES):
    empty = fdg.Layer(
        lambda key, x: ({"none": jnp.zeros((0, 3)), "one": jnp.ones(())}, ()),
        lambda p, s, x, *, train, key: (p["one"] * x, s),
    )
    layers = [*networks.network()[:-1], networks.dense(width), empty]
    return fdg.partition(layers, len(cuts) + 1, X, cost=cuts)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with batches in flight, one stage without weights, and its state."""
    folder, stages = tmp_path_factory.mktemp("saved"), cut(2, 3, 5)
    schedule = fdg.schedule.fdg(4)
    pipe = fdg.Pipeline(stages, networks.loss_fn, networks.sgd(1.0, 4), schedule)
    state = pipe.init(jax.random.key(7), X)
    for batch in DATA:
        state, _ = pipe.step(state, batch)
    with Checkpointer(folder, pipe) as checkpoints:
        checkpoints.save(state, 3)
    return manifest.folder(folder, 3), state


def test_they_are_those_of_the_state(saved):
    folder, state = saved
    found = weights.read(folder, cut(2, 3, 5), X)
    for name in ("params", "model_state"):
        expected = [getattr(stage, name) for stage in state.stages]
        assert all(isinstance(v, np.ndarray) for v in jax.tree.leaves(getattr(found, name)))
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), expected)


def test_where_the_optimizer_predicts_they_are_the_true_ones(tmp_path):
    schedule = fdg.schedule.fdg(4)

    def optimizer(k):
        late = fdg.delayed_sgd(0.1, 0.9, (schedule, k))
        labels = lambda p: jax.tree.map(lambda leaf: "ab"[leaf.ndim % 2], p)  # noqa: E731
        return optax.partition(
            {"a": late, "b": fdg.predict_weights(optax.adam(0.1), (schedule, k))}, labels
        )

    pipe = fdg.Pipeline(cut(2, 3, 5), networks.loss_fn, optimizer, schedule)
    state = pipe.init(jax.random.key(7), X)
    for batch in networks.batches(9):
        state, _ = pipe.step(state, batch)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, 9)
    folder = manifest.folder(tmp_path, 9)
    found = weights.read(folder, cut(2, 3, 5), X, optimizer)
    jax.tree.map(np.testing.assert_array_equal, found.params, pipe.true_params(state))
    trained = weights.read(folder, cut(2, 3, 5), X).params
    pairs = zip(jax.tree.leaves(found.params[0]), jax.tree.leaves(trained[0]), strict=True)
    assert all(np.abs(a - b).max() > 1e-4 for a, b in pairs)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (cut(2), "stages: .* has 4 .* these are 2"),
        (cut(1, 3, 5), r"stage 0, params: the checkpoint has 4 arrays, this pipeline 2"),
        (cut(2, 3, 5, width=4), r"stage 3, params.*: the checkpoint has .*\[3\], .*\[4\]"),
    ],
)
def test_other_stages_are_refused(saved, stages, message):
    with pytest.raises(ValueError, match=message):
        weights.read(saved[0], stages, X)


def test_a_damaged_checkpoint_is_refused(saved):
    folder, _ = saved
    path = folder / "arrays" / "stage_1" / "manifest.ocdbt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        name = re.escape(str(path.relative_to(folder)))
        with pytest.raises(ValueError, match=f"{name} has changed"):
            weights.read(folder, cut(2, 3, 5), X)
    finally:
        path.write_bytes(whole)
