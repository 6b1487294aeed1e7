"""The predicted cotangent: zero at first, like the output, and it learns from labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fdg_jax import models

KEY = jax.random.key(5)
LABELS = jnp.array([0, 2, 1, 2])


def normal(seed, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


OUTPUTS = {
    "image": ("conv", normal(0, 4, 3, 3, 2)),
    "image, mlp": ("mlp", normal(0, 4, 3, 3, 2)),
    "streams": ("conv", (normal(0, 4, 3, 3, 2), normal(1, 4, 3, 3, 1))),
    "tokens": ("mlp", normal(0, 4, 5, 3)),
    "streams of tokens": ("mlp", (normal(0, 4, 5, 3), normal(1, 4, 5, 3))),
    "half precision": ("conv", normal(0, 4, 3, 3, 2, dtype=jnp.bfloat16)),
}


def moved(params):
    """Params whose last layer is not 0."""
    return jax.tree.map(lambda v: v + 0.1, params)


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("output", OUTPUTS)
def test_it_is_like_the_output_and_zero_at_first(output, classes):
    kind, y = OUTPUTS[output]
    layer = models.synthesizer(kind, classes, width=4)
    x = (y, None if classes is None else LABELS)
    params, state = layer.init(KEY, x)

    def predicted(params):
        delta, new = layer.apply(params, state, x, train=True, key=None)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert jax.tree.structure(delta) == jax.tree.structure(y)
        for a, b in zip(jax.tree.leaves(delta), jax.tree.leaves(y), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        return delta

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(predicted(params)))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(predicted(moved(params))))
    # Everything but the last layer is not 0, so that it learns.
    first = [v for v in jax.tree.leaves(params["first"]) if v.ndim > 1]
    assert all((v != 0).any() for v in first)


def test_the_convolutions_are_the_papers():
    layer = models.synthesizer(labels=10)
    y = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    params, state = jax.eval_shape(lambda x: layer.init(KEY, x), y)
    kernels = [params["first"]["conv"], params["second"]["conv"], params["last"]]
    shapes = [kernel["kernel"].shape for kernel in kernels]
    assert shapes == [(5, 5, 26, 128), (5, 5, 128, 128), (5, 5, 128, 16)]
    assert sorted(params) == ["first", "last", "second"]
    assert sorted(state) == ["first", "second"]  # batch norm, but not after the last


def test_streams_are_read_and_made_side_by_side():
    streams = OUTPUTS["streams"][1]
    one = jnp.concatenate(streams, axis=-1)
    layer = models.synthesizer(labels=3, width=4)
    params, state = layer.init(KEY, (streams, LABELS))
    params = moved(params)
    pair, _ = layer.apply(params, state, (streams, LABELS), train=True, key=None)
    whole, _ = layer.apply(params, state, (one, LABELS), train=True, key=None)
    np.testing.assert_array_equal(jnp.concatenate(pair, axis=-1), whole)


@pytest.mark.parametrize(
    ("kind", "shape", "labels"),
    [("conv", (4, 3, 3, 2), (4,)), ("mlp", (4, 5, 3), (4, 5)), ("mlp", (4, 5, 3), (4,))],
)
def test_a_label_is_for_its_own_place_alone(kind, shape, labels):
    y, given = normal(0, *shape), jnp.zeros(labels, jnp.int32)
    layer = models.synthesizer(kind, 3, width=8)
    params, state = layer.init(KEY, (y, given))
    # In evaluation, where batch norm does not mix the rows.
    first, second = (
        layer.apply(moved(params), state, (y, c), train=False, key=None)[0]
        for c in (given, given.ravel().at[1].set(2).reshape(labels))
    )
    changed = jnp.abs(first - second).max(-1) > 0
    want = np.zeros(shape[:-1], bool)
    want[(0, 1) if len(labels) == 2 else 1] = True
    np.testing.assert_array_equal(changed, want)


def test_labels_are_not_looked_at_where_none_are_asked_for():
    y = normal(0, 4, 3)
    layer = models.synthesizer("mlp", width=4)
    params, state = layer.init(KEY, (y, None))
    results = [
        layer.apply(moved(params), state, (y, c), train=True, key=None)[0] for c in (None, LABELS)
    ]
    np.testing.assert_array_equal(*results)


def test_it_learns_what_follows_from_the_label():
    """The output is noise, another at every step, so that nothing can be learned from it."""
    labels = jnp.arange(32) % 4
    target = normal(1, 4, 3)[labels]

    def left(classes):
        layer = models.synthesizer("mlp", classes, width=8)
        params, state = layer.init(KEY, (target, labels))
        optimizer = optax.adam(0.03)

        def loss(params, step):
            x = normal(step, *target.shape), labels
            delta, _ = layer.apply(params, state, x, train=True, key=None)
            return jnp.mean((delta - target) ** 2)

        def one(step, carry):
            params, moments = carry
            updates, moments = optimizer.update(jax.grad(loss)(params, step), moments)
            return optax.apply_updates(params, updates), moments

        end, _ = jax.lax.fori_loop(2, 202, one, (params, optimizer.init(params)))
        return float(loss(params, 0)), float(loss(end, 0))

    start, end = left(4)
    assert end < 0.05 * start
    assert left(None)[1] > 0.5 * start


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.synthesizer("cnn"), "kind='cnn': allowed are conv, mlp"),
        (lambda: models.synthesizer(labels=0), "labels=0: must be 1 or more"),
        (lambda: models.synthesizer(width=0), "width=0: must be 1 or more"),
        (
            lambda: models.synthesizer().init(KEY, jnp.ones((4, 3, 3, 2))),
            r"synthesizer: its input is .*; give the pair \(y, labels\)",
        ),
        (
            lambda: models.synthesizer().init(KEY, (jnp.ones((4, 5, 3)), None)),
            r"synthesizer: kind='conv' is for images .* \[4, 5, 3\]; give kind='mlp'",
        ),
        (
            lambda: models.synthesizer("mlp", 3).init(KEY, (jnp.ones((4, 3)), None)),
            "synthesizer: labels=3, and its input has none; give",
        ),
        (
            lambda: models.synthesizer("mlp", 3).init(KEY, (jnp.ones((5, 3)), LABELS)),
            r"synthesizer: labels of shape \[4\] for an output of \[5, 3\]; give one a row",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
