"""The convolution's derivative against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdg_jax.models import conv2d


def plain(x, kernel, stride, padding):
    pads = ((padding, padding),) * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=numbers
    )


def gradients(function, x, kernel, stride, padding, dtype):
    @jax.jit
    def run(x, kernel):
        y, vjp = jax.vjp(lambda x, k: function(jax.nn.relu(x), k, stride, padding), x, kernel)
        return y, vjp(jnp.cos(y))

    keys = jax.random.split(jax.random.key(0))
    return run(jax.random.normal(keys[0], x, dtype), jax.random.normal(keys[1], kernel, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [
        ((2, 8, 8, 3), (3, 3, 3, 5), 1, 1),
        ((2, 8, 8, 4), (3, 3, 4, 4), 2, 1),
        ((3, 7, 5, 2), (3, 3, 2, 3), 2, 1),  # odd sizes
        ((3, 7, 6, 2), (3, 3, 2, 3), 1, 0),
        ((2, 6, 6, 4), (1, 1, 4, 8), 1, 0),
        ((2, 7, 7, 4), (1, 1, 4, 8), 2, 0),
        ((2, 9, 9, 2), (5, 5, 2, 3), 3, 2),
        ((1, 1, 1, 1), (3, 3, 1, 1), 1, 1),
        ((70, 4, 4, 2), (3, 3, 2, 3), 1, 1),  # in parts, the last one smaller
        ((9, 32, 16, 64), (3, 3, 64, 64), 2, 1),
    ],
)
def test_output_and_gradients_equal_xlas(shape, kernel, stride, padding, dtype):
    with jax.enable_x64(dtype == "float64"):
        ours = gradients(conv2d, shape, kernel, stride, padding, dtype)
        theirs = gradients(plain, shape, kernel, stride, padding, dtype)
        tolerance = 1e-5 if dtype == "float32" else 1e-13
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("shape", "kernel", "options", "same"),
    [
        ((2, 7, 8, 3), (3, 3, 3, 5), {"padding": "SAME", "stride": 2}, {}),
        ((2, 7, 8, 3), (2, 3, 3, 5), {"padding": "same"}, {"padding": "SAME"}),
        ((2, 7, 8, 3), (3, 3, 3, 5), {"padding": "VALID", "stride": (2, 1)}, {}),
        ((2, 7, 8, 3), (3, 2, 3, 5), {"padding": ((0, 2), (1, 0)), "stride": (1, 3)}, {}),
        ((2, 7, 8, 3), (3, 3, 3, 5), {"padding": 2, "dilation": 2}, {"padding": [(2, 2)] * 2}),
        ((2, 9, 8, 3), (3, 3, 3, 5), {"padding": "SAME", "dilation": (2, 1), "stride": 2}, {}),
        ((2, 7, 8, 6), (3, 3, 2, 9), {"padding": "SAME", "groups": 3}, {}),
    ],
)
def test_options_are_those_of_lax(shape, kernel, options, same):
    def pair(name):
        value = options.get(name, 1)
        return value if isinstance(value, tuple) else (value, value)

    def theirs(x, k):
        return jax.lax.conv_general_dilated(
            x,
            k,
            pair("stride"),
            same.get("padding", options["padding"]),
            rhs_dilation=pair("dilation"),
            feature_group_count=options.get("groups", 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    keys = jax.random.split(jax.random.key(0))
    x, k = (jax.random.normal(key, size) for key, size in zip(keys, (shape, kernel), strict=True))
    found = []
    for function in (lambda x, k: conv2d(x, k, **options), theirs):
        y, vjp = jax.vjp(function, x, k)
        found.append((y, *vjp(jnp.cos(y))))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "SAME_LOWER"}, "padding='SAME_LOWER': must be a number, 'SAME', 'VALID'"),
        ({"padding": (1, 1)}, r"padding=\(1, 1\): must be a number"),
        ({"stride": 0}, "stride=0: must be 1 or more"),
        ({"dilation": (1, 2, 3)}, r"dilation=\(1, 2, 3\): must be 1 or more"),
        ({"groups": 2}, r"conv2d: x is \[2, 8, 8, 3\] and kernel \[3, 3, 3, 5\], groups=2"),
    ],
)
def test_what_is_no_convolution_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        conv2d(jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), **options)


def test_what_the_gradient_reads_is_computed_once():
    """In the compiled program no transpose is fused with what was computed before it."""

    def loss(x, kernel):
        return jnp.sum(conv2d(jnp.sin(x), kernel, 1, 1) ** 2)

    shapes = jnp.ones((4, 8, 8, 4), jnp.float32), jnp.ones((3, 3, 4, 4), jnp.float32)
    text = jax.jit(jax.grad(loss, 1)).lower(*shapes).compile().as_text()
    computations = text.split("\n\n")
    assert any("conditional(" in part for part in computations)
    for part in computations:
        if not part.startswith("ENTRY"):
            assert not ("sine(" in part and "transpose(" in part)


def test_nan_weights_are_not_hidden():
    kernel = jnp.ones((3, 3, 2, 2)).at[0, 0, 0, 0].set(jnp.nan)
    gradient = jax.grad(lambda k: jnp.sum(conv2d(jnp.ones((1, 4, 4, 2)), k, 1, 1) ** 2))(kernel)
    assert jnp.isnan(gradient).all()
