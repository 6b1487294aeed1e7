"""The transformer's operations against their definitions, with derivatives, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.text import operations


def attention(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
    lower = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(lower, scores, -jnp.inf)), v)


def norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(
        x.var(-1, keepdims=True) + 1e-5
    ) * scale + bias


CASES = {
    "attention": (operations.causal_attention, attention, [(2, 5, 3, 4)] * 3),
    "gelu": (operations.gelu, jax.nn.gelu, [(3, 4)]),
    "norm": (operations.layer_norm, norm, [(2, 3, 4), (4,), (4,)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives(name):
    own, other, shapes = CASES[name]
    rng = np.random.default_rng(0)
    inputs = [10 * rng.normal(size=shape) for shape in shapes]
    y, pull = jax.vjp(own, *inputs)
    expected, pull_expected = jax.vjp(other, *inputs)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
    cotangent = rng.normal(size=y.shape)
    for found, wanted in zip(pull(cotangent), pull_expected(cotangent), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_stays(name):
    own, _, shapes = CASES[name]
    rng = np.random.default_rng(0)
    wide = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    half = [jnp.asarray(value, jnp.bfloat16) for value in wide]
    y, pull = jax.vjp(own, *half)
    assert y.dtype == jnp.bfloat16
    assert {gradient.dtype for gradient in pull(y)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(y.astype(jnp.float32), own(*wide), atol=0.1)


def test_far_scores_do_not_overflow():
    """A later position with a huge score takes nothing from the earlier ones."""
    q = k = jnp.array([[[[1.0]], [[1000.0]]]])
    y, pull = jax.vjp(operations.causal_attention, q, k, k)
    np.testing.assert_array_equal(y, k)
    assert all(jnp.isfinite(gradient).all() for gradient in pull(y))
