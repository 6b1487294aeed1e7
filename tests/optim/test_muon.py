"""Which arrays Muon takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from fdg_jax import optim


def test_kernels_of_every_kind_are_matrices_and_nothing_else_is():
    shapes = {
        "dense": {"kernel": (4, 5), "bias": (5,)},
        "stacked": {"kernel": (3, 4, 5), "bias": (3, 5)},
        "conv": {"kernel": (3, 3, 4, 5)},
        "stacked conv": {"kernel": (2, 3, 3, 4, 5)},
        "embedding": {"token": (7, 4)},
        "logits": {"kernel": (4, 7)},
        "scalar": {"kernel": ()},
    }
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda node: isinstance(node, tuple))
    found = optim.muon_dimension_numbers(exclude="logits")(params)
    want = {
        "dense": {"kernel": MuonDimensionNumbers((0,), (1,)), "bias": None},
        "stacked": {"kernel": MuonDimensionNumbers((1,), (2,)), "bias": None},
        "conv": {"kernel": MuonDimensionNumbers((0, 1, 2), (3,))},
        "stacked conv": {"kernel": MuonDimensionNumbers((1, 2, 3), (4,))},
        "embedding": {"token": None},
        "logits": {"kernel": None},
        "scalar": {"kernel": None},
    }
    assert found == want


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 3, 4, 5)])
def test_what_is_stacked_is_updated_block_by_block(shape):
    optimizer = optax.contrib.muon(
        0.1, muon_weight_dimension_numbers=optim.muon_dimension_numbers()
    )
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=shape))}
    whole, _ = optimizer.update(params, optimizer.init(params), params)
    for i in range(shape[0]):
        one = {"kernel": params["kernel"][i]}
        alone, _ = optimizer.update(one, optimizer.init(one), one)
        np.testing.assert_allclose(whole["kernel"][i], alone["kernel"], rtol=0, atol=1e-12)
