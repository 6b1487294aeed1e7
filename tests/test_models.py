"""The networks: sizes as published, shapes, names."""

import jax
import jax.numpy as jnp
import pytest

import fdg_jax as fdg
from fdg_jax import models

IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def parameters(name: str, **options) -> int:
    network = fdg.chain(models.create(name, **options))
    params, _ = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), IMAGE)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "millions", "digits"),
    [
        ("resnet20", 0.27, 2),
        ("resnet32", 0.46, 2),
        ("resnet44", 0.66, 2),
        ("resnet56", 0.85, 2),
        ("resnet110", 1.7, 1),
        ("resnet1202", 19.4, 1),
        ("resnet18", 11.2, 1),
        ("resnet34", 21.3, 1),
        ("resnet50", 23.5, 1),
        ("resnet101", 42.5, 1),
        ("wrn28_10", 36.5, 1),
        ("small_resnet", 0.3, 1),
    ],
)
def test_number_of_parameters_is_the_published_one(name, millions, digits):
    assert round(parameters(name) / 1e6, digits) == millions
