"""Golden values: initial weights and dropout noise, as numbers that must never change.

They follow from the root key, the layer's place in the whole network, and the batch's number. A run
and its reference share the code that makes them, so only numbers can tell when both change.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from tests import networks

KEY = 3
KERNELS = [
    [
        [-0.5498769658421716, -0.24560442129753057],
        [-0.000455250566918362, -0.3571777547543058],
        [0.4055632399056086, -0.5216925110361971],
    ],
    [[-0.6470264128789124, 0.2628400834420213], [-0.6190067887716731, -1.5131812340147008]],
]
# What dropout keeps, by layer and batch.
KEPT = {
    (0, 0): ["11011110", "01000100"],
    (0, 1): ["01101000", "00010101"],
    (1, 0): ["11100110", "10011000"],
    (1, 1): ["10010101", "11001111"],
}


def mask(layer: int, batch: int) -> np.ndarray:
    return np.array([[int(c) for c in row] for row in KEPT[layer, batch]])


def test_initial_weights_of_two_layers():
    layers = [networks.dense(2), networks.dropout(), networks.dense(2)]
    for cuts in ([], [1], [2]):
        stages = fdg.partition(layers, len(cuts) + 1, jnp.ones((1, 3)), cost=cuts)
        pipe = fdg.Pipeline(stages, networks.loss_fn, optax.sgd(1), fdg.schedule.fdg(len(stages)))
        state = pipe.init(jax.random.key(KEY), np.ones((1, 3)))
        params = [layer for stage in pipe.params(state) for layer in stage]
        for found, expected in zip(params[::2], KERNELS, strict=True):
            np.testing.assert_allclose(found["kernel"], expected, rtol=1e-15)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_dropout_noise_of_two_layers_and_two_batches(num_stages):
    def loss_fn(outputs, labels):
        return outputs.mean(), {"outputs": outputs}

    stages = fdg.partition(
        [networks.dropout(0.5)] * 2, num_stages, jnp.ones((2, 8)), cost=[1] * (num_stages - 1)
    )
    pipe = fdg.Pipeline(stages, loss_fn, optax.sgd(1), fdg.schedule.fdg(num_stages))
    _, metrics = networks.run(pipe, [(np.ones((2, 8)), np.zeros(2))] * 2, jax.random.key(KEY))
    for batch, found in enumerate(metrics):
        expected = 4 * mask(0, batch) * mask(1, batch)
        np.testing.assert_array_equal(found.aux["outputs"], expected)
