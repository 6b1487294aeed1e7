"""Layers with an inverse: coupling, reversible, two_streams, and chains and repeats of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdg_jax as fdg
from tests import networks

KEY = jax.random.key(3)
X = jax.random.normal(jax.random.key(4), (networks.BATCH, 2 * networks.WIDTH))
STREAMS = tuple(jnp.split(X, 2, axis=-1))


def branch():
    """Every kind of state and noise in a branch."""
    return fdg.chain([networks.dense(networks.WIDTH), networks.batch_norm(), networks.dropout()])


LAYERS = {
    "coupling": lambda: fdg.coupling(branch()),
    "two branches": lambda: fdg.reversible(branch(), networks.dense(networks.WIDTH)),
    "repeat": lambda: fdg.repeat(fdg.coupling(branch()), 3),
    "repeat, scanned": lambda: fdg.repeat(fdg.coupling(branch()), 3, unroll=False),
    "repeat of two": lambda: fdg.repeat(fdg.reversible(branch(), branch()), 2),
    "chain": lambda: fdg.chain([fdg.coupling(branch()), fdg.repeat(fdg.coupling(branch()), 2)]),
    "numbered": lambda: fdg.coupling(branch()).at(5),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("train", [True, False])
def test_the_inverse_of_the_output_is_the_input(name, train):
    layer = LAYERS[name]()
    params, state = layer.init(KEY, STREAMS)
    key = KEY if train else None
    y, _ = layer.apply(params, state, STREAMS, train=train, key=key)
    x = layer.inverse(params, state, y, train=train, key=key)
    assert networks.difference(x, STREAMS) <= 1e-12


@pytest.mark.parametrize("name", LAYERS)
def test_reverse_is_the_inverse_and_the_derivative(name):
    layer = LAYERS[name]()
    params, state = layer.init(KEY, STREAMS)
    y, vjp = jax.vjp(lambda p, x: layer.apply(p, state, x, train=True, key=KEY)[0], params, STREAMS)
    cotangent = jax.tree.map(jnp.cos, y)
    x, gradient, below = layer.reverse(params, state, y, cotangent, key=KEY)
    assert networks.difference(x, STREAMS) <= 1e-12
    assert networks.difference((gradient, below), vjp(cotangent)) <= 1e-12


def test_two_streams_come_together_again():
    layer = fdg.two_streams()
    y, _ = layer.apply((), (), X, train=True, key=None)
    np.testing.assert_array_equal(layer.inverse((), (), y, train=True, key=None), X)
    x, _, below = layer.reverse((), (), y, y, key=None)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(below, X)


def test_one_evaluation_of_the_branch_serves_inverse_and_derivative():
    calls = []

    def apply(params, state, x, *, train, key):
        calls.append(train)
        return jnp.sin(x), state

    layer = fdg.coupling(fdg.Layer(lambda key, x: ((), ()), apply))
    layer.reverse((), (), STREAMS, STREAMS, key=None)
    assert calls == [True]


def test_a_layer_may_give_its_inverse_alone():
    double = fdg.Layer(
        lambda key, x: (jnp.float64(2), ()),
        lambda p, s, x, *, train, key: (p * x, s),
        inverse=lambda p, s, y, *, train, key: y / p,
    )
    layer = fdg.repeat(double, 2)
    params, state = layer.init(KEY, X)
    x, gradient, below = layer.reverse(params, state, 4 * X, jnp.ones_like(X), key=None)
    np.testing.assert_allclose(x, X)
    np.testing.assert_allclose(gradient, [2 * X.sum(), 2 * X.sum()])
    np.testing.assert_allclose(below, 4)


def test_a_chain_with_one_layer_that_has_none_has_no_inverse():
    assert fdg.chain([fdg.coupling(branch()), networks.merge()]).inverse is None
    assert fdg.repeat(networks.dense(3), 2).inverse is None


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X, r"not a pair of streams; put a layer before it that makes two"),
        ((X, STREAMS[0]), r"streams of float64\[8, 12\] and float64\[8, 6\]"),
        ((X, X), r"the branch makes float64\[8, 6\]; all three must be equal"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        fdg.coupling(networks.dense(networks.WIDTH)).init(KEY, x)
    with pytest.raises(ValueError, match="floating point"):
        fdg.coupling(fdg.from_fn(lambda x: x)).init(KEY, (jnp.ones(3, int), jnp.ones(3, int)))
