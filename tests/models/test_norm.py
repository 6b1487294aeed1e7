"""Batch norm and ReLU against flax and JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdg_jax.models.compute import Compute
from fdg_jax.models.norm import Norm, batch_norm, relu


def by_definition(x, scale, bias, epsilon, activate):
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    y = scale * (x - mean) / jnp.sqrt(x.var(axes) + epsilon) + bias
    return jnp.maximum(y, 0) if activate else y


@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 6)])
def test_gradients_are_those_of_the_definition(shape, activate):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 4)
        x = 3 + 2 * jax.random.normal(keys[0], shape, "float64")
        scale, bias, g = (
            jax.random.normal(k, s, "float64")
            for k, s in zip(keys[1:], (shape[-1:], shape[-1:], shape), strict=True)
        )
        ours, vjp = jax.vjp(lambda *a: batch_norm(*a, 1e-5, activate)[0], x, scale, bias)
        theirs, their_vjp = jax.vjp(lambda *a: by_definition(*a, 1e-5, activate), x, scale, bias)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
        for a, b in zip(vjp(g), their_vjp(g), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_running_statistics_are_those_of_flax():
    x = 1 + jax.random.normal(jax.random.key(0), (8, 4, 4, 3), jnp.float32)
    ours = Norm(3, relu=True, rngs=nnx.Rngs(0))
    theirs = Norm(3, relu=True, compute=Compute(fast=False), rngs=nnx.Rngs(0))
    for _ in range(3):
        np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    for name in ("mean", "var"):
        np.testing.assert_allclose(getattr(ours, name)[...], getattr(theirs, name)[...], rtol=1e-6)
    ours.eval()
    theirs.eval()
    np.testing.assert_array_equal(ours(x), theirs(x))


def test_relu_passes_gradients_where_it_is_open():
    x = jnp.array([-1.0, 0.0, 2.0])
    y, vjp = jax.vjp(relu, x)
    assert y.tolist() == [0, 0, 2]
    assert vjp(jnp.ones(3))[0].tolist() == jax.vjp(jax.nn.relu, x)[1](jnp.ones(3))[0].tolist()


def test_residuals_are_input_and_output_alone():
    x = jnp.ones((4, 5, 5, 2))
    _, vjp = jax.vjp(lambda x: batch_norm(x, jnp.ones(2), jnp.zeros(2), 1e-5, True)[0], x)
    large = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size > 2]
    assert [leaf.shape for leaf in large] == [x.shape, x.shape]


def test_half_precision_keeps_its_dtype_and_wide_statistics():
    x = jnp.ones((4, 2), jnp.bfloat16)
    scale, bias = jnp.ones(2, jnp.float32), jnp.zeros(2, jnp.float32)
    y, mean, variance = batch_norm(x, scale, bias)
    assert (y.dtype, mean.dtype, variance.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    grads = jax.grad(lambda *a: batch_norm(*a)[0].sum().astype(jnp.float32), (0, 1, 2))(
        x, scale, bias
    )
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]
