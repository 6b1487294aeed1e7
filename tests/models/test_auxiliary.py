"""The classifier beside a stage: by definition, of images, tokens and streams."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdg_jax import models
from fdg_jax.models.auxiliary import mean_pool

KEY = jax.random.key(5)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def pooled(x, height, width):
    """By definition: window i is pixels i H / n, rounded down, to (i + 1) H / n, rounded up."""
    x, out = np.asarray(x), np.zeros((len(x), height, width, x.shape[-1]))
    for i, j in itertools.product(range(height), range(width)):
        (a, b), (c, d) = (
            (int(np.floor(k * size / n)), int(np.ceil((k + 1) * size / n)))
            for k, size, n in ((i, x.shape[1], height), (j, x.shape[2], width))
        )
        out[:, i, j] = x[:, a:b, c:d].mean((1, 2))
    return out


@pytest.mark.parametrize(
    ("size", "to"), [((8, 8), (2, 2)), ((7, 5), (2, 2)), ((1, 1), (2, 2)), ((3, 8), (2, 4))]
)
def test_pooling_by_definition(size, to):
    x = normal(0, 2, *size, 3)
    np.testing.assert_allclose(mean_pool(x, *to), pooled(x, *to), rtol=1e-12, atol=1e-15)


def norm_relu(params, x):
    axes = tuple(range(x.ndim - 1))
    x = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)
    return np.maximum(params["scale"] * x + params["bias"], 0)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["mlp-sr", "mlp"])
def test_images_by_definition(kind, fast):
    head = models.auxiliary_head(7, kind, models.Compute(fast=fast))
    x = normal(0, 5, 9, 6, 3)
    params, state = jax.tree.map(lambda v: v.astype(jnp.float64), head.init(KEY, x))
    y, new = head.apply(params, state, x, train=True, key=None)
    assert y.shape == (5, 7)

    _, *inner, logits = jax.tree.map(np.asarray, params)
    value = pooled(x, 3, 2)
    if kind == "mlp-sr":
        for conv in inner[:3]:
            value = norm_relu(conv["norm"], value @ conv["conv"]["kernel"][0, 0])
        inner = inner[3:]
    assert inner[0] == ()  # the second pooling
    value = pooled(value, 2, 2).reshape(5, 12)
    for dense in inner[1:]:
        value = norm_relu(dense["norm"], value @ dense["dense"]["kernel"])
    assert len(inner[1:]) == 3
    want = value @ logits["dense"]["kernel"] + logits["dense"]["bias"]
    np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-10)

    # Batch norm's running statistics move in training alone.
    assert shapes(new) == shapes(state)
    moved = [(a != b).any() for a, b in zip(*map(jax.tree.leaves, (new, state)), strict=True)]
    assert moved
    assert all(moved)
    _, same = head.apply(params, state, x, train=False, key=None)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_width_is_that_of_the_example():
    head = models.auxiliary_head(3)
    for width in (2, 5, 2):
        params, state = jax.eval_shape(lambda x: head.init(KEY, x), jnp.ones((2, 8, 8, width)))
        assert params[1]["conv"]["kernel"].shape == (1, 1, width, width)
        assert params[5]["dense"]["kernel"].shape == (4 * width, 4 * width)
        y = jax.eval_shape(
            lambda p, s, x: head.apply(p, s, x, train=True, key=None)[0],
            params,
            state,
            jnp.ones((2, 8, 8, width)),
        )
        assert y.shape == (2, 3)


@pytest.mark.parametrize("shape", [(4, 6, 6, 2), (4, 5, 2), (4, 2)])
def test_streams_are_read_side_by_side(shape):
    head = models.auxiliary_head(3)
    streams = normal(0, *shape), normal(1, *shape[:-1], 3)
    one = jnp.concatenate(streams, axis=-1)
    params, state = head.init(KEY, streams)
    jax.tree.map(np.testing.assert_array_equal, params, head.init(KEY, one)[0])
    y = [head.apply(params, state, x, train=True, key=None)[0] for x in (streams, one)]
    np.testing.assert_array_equal(*y)


@pytest.mark.parametrize("kind", ["mlp-sr", "mlp"])
@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 4)])
def test_tokens_and_vectors_pass_a_layer_norm_and_a_dense_layer(shape, kind):
    head, x = models.auxiliary_head(6, kind), normal(0, *shape)
    params, state = head.init(KEY, x)
    y, _ = head.apply(params, state, x, train=True, key=None)
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    want = normed @ params["dense"]["kernel"] + params["dense"]["bias"]
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
    assert y.shape == (*shape[:-1], 6)


@pytest.mark.parametrize("kind", ["mlp-sr", "mlp"])
def test_half_precision_is_of_activations_alone(kind):
    head = models.auxiliary_head(3, kind, models.Compute(jnp.bfloat16))
    x = jnp.ones((2, 8, 8, 4), jnp.bfloat16)
    params, state = head.init(KEY, x)
    y, new = head.apply(params, state, x, train=True, key=None)
    assert {v.dtype for v in jax.tree.leaves((params, new, y))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.auxiliary_head(kind="cnn"), "kind='cnn': allowed are mlp-sr, mlp"),
        (lambda: models.auxiliary_head(0), "num_classes=0: must be 1 or more"),
        (
            lambda: models.auxiliary_head().init(KEY, jnp.ones(3)),
            r"auxiliary_head: its input has 1 axes, \[3\]; give images \[B, H, W, C\]",
        ),
        (
            lambda: models.auxiliary_head().init(KEY, (jnp.ones((2, 3)), jnp.ones((4, 3)))),
            r"auxiliary_head: its input is \[2, 3\], \[4, 3\]; give one array, or streams",
        ),
        (lambda: models.auxiliary_head().init(KEY, ()), "auxiliary_head: its input is no array"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
