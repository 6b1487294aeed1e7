"""Layer, chain and repeat: layout, numbering, and the two ways in which a repeat compiles."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fdg_jax as fdg

KEY = jax.random.key(7)
X = jax.random.normal(jax.random.key(8), (4, 3))


def dense(width=3):
    """Random weights, no bias."""
    return fdg.Layer(
        lambda key, x: (jax.random.normal(key, (x.shape[-1], width)) / 2, ()),
        lambda p, s, x, *, train, key: (jnp.tanh(x @ p), s),
    )


def noise():
    """Adds noise in training; the key must be there exactly then."""

    def apply(params, state, x, *, train, key):
        assert (key is None) == (not train)
        return (x + jax.random.normal(key, x.shape) if train else x), state

    return fdg.Layer(lambda key, x: ((), ()), apply)


def statistics():
    """Subtracts the batch mean in training and its moving average in evaluation."""

    def apply(params, state, x, *, train, key):
        mean = x.mean(0) if train else state["mean"]
        new = {"mean": 0.5 * state["mean"] + 0.5 * mean} if train else state
        return (x - mean) * params, new

    return fdg.Layer(lambda key, x: (jnp.ones(3), {"mean": jnp.zeros(3)}), apply)


def equal(a, b):
    """Same structure, same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-12, atol=1e-12), a, b)


def flat(tree):
    """All numbers in layer order; a repeat's stacked layers follow each other."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_params_and_state_are_tuples_in_layer_order():
    net = fdg.chain([dense(5), noise(), fdg.chain([dense(3), statistics()])])
    params, state = net.init(KEY, X)
    assert jax.tree.map(jnp.shape, params) == ((3, 5), (), ((5, 3), (3,)))
    assert jax.tree.map(jnp.shape, state) == ((), (), ((), {"mean": (3,)}))
    _, new = net.apply(params, state, X, train=True, key=KEY)
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_a_chain_applies_its_layers_in_order():
    net = fdg.chain([fdg.from_fn(lambda x: x + 1), fdg.from_fn(lambda x: 2 * x)])
    y, _ = net.apply(((), ()), ((), ()), jnp.array([3.0]), train=False, key=None)
    assert y == 8


def test_activations_may_be_any_pytree():
    net = fdg.chain(
        [
            fdg.from_fn(lambda x: {"a": x, "b": (2 * x, x[:, :1])}),
            fdg.repeat(fdg.from_fn(lambda d: {"a": d["b"][0], "b": (d["a"], d["b"][1])}), 3),
            fdg.from_fn(lambda d: d["a"] + d["b"][1]),
        ]
    )
    y, _ = net.apply(*net.init(KEY, X), X, train=True, key=KEY)
    equal(y, 2 * X + X[:, :1])


def test_every_init_gets_an_array_of_its_own_input():
    """An init may compute with its example, in the middle of a network as well."""
    bias = fdg.Layer(
        lambda key, x: (x.sum(0), ()), lambda p, s, x, *, train, key: (x + p[: x.shape[-1]], s)
    )
    params, _ = fdg.chain([dense(5), bias, dense(2), fdg.repeat(bias, 2)]).init(KEY, X)
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [(3, 5), (5,), (5, 2), (2, 2)]


def network():
    """Eight parts between which it can be cut; ten numbered layers."""
    return [
        dense(),
        noise(),
        fdg.repeat(dense(), 2),
        fdg.chain([noise(), dense()]),
        fdg.repeat(fdg.chain([dense(), noise()]), 2),
        dense(),
    ]


def cut(cuts):
    return fdg.partition(network(), len(cuts) + 1, X, cost=cuts)


def numbered(stages):
    """Stages under the numbers that their layers have in the whole network."""
    first = itertools.accumulate((stage.size for stage in stages), initial=0)
    return [stage.at(index) for stage, index in zip(stages, first, strict=False)]


@given(st.sets(st.integers(1, 7), min_size=1, max_size=4).map(sorted))
@settings(max_examples=5)
def test_weights_and_noise_do_not_depend_on_the_cuts(cuts):
    whole = fdg.chain(network())
    params, state = whole.init(KEY, X)
    want, _ = whole.apply(params, state, X, train=True, key=KEY)
    parts, y = [], X
    for stage in numbered(cut(cuts)):
        p, s = stage.init(KEY, y)
        y, _ = stage.apply(p, s, y, train=True, key=KEY)
        parts.append(p)
    equal(flat(parts), flat(params))
    equal(y, want)


def test_a_pipeline_starts_from_the_same_weights_for_every_number_of_stages():
    def start(cuts):
        pipe = fdg.Pipeline(
            cut(cuts),
            lambda y, t: (jnp.mean((y - t) ** 2), {}),
            lambda k: optax.sgd(0.1),
            fdg.schedule.fdg(len(cuts) + 1),
        )
        return flat(pipe.params(pipe.init(KEY, X)))

    equal(start([1, 3, 6]), start([]))


def test_nesting_chains_changes_neither_weights_nor_noise():
    layers = [dense(), noise(), dense(), noise()]
    nested = fdg.chain([fdg.chain([layers[0], fdg.chain(layers[1:3])]), layers[3]])
    assert nested.size == 4
    results = []
    for net in (fdg.chain(layers), nested):
        params, state = net.init(KEY, X)
        results.append((flat(params), net.apply(params, state, X, train=True, key=KEY)[0]))
    equal(*results)


def test_the_same_layer_twice_has_two_weights_and_two_noises():
    layer, zeros = noise(), jnp.zeros((4, 3))
    first, second = fdg.chain([dense()] * 2).init(KEY, X)[0]
    assert abs(first - second).min() > 0
    once, _ = layer.at(0).apply((), (), zeros, train=True, key=KEY)
    twice, _ = fdg.chain([layer] * 2).apply(((), ()), ((), ()), zeros, train=True, key=KEY)
    assert abs(twice - 2 * once).min() > 0


def test_weights_and_noise_follow_the_key():
    net = fdg.chain([dense(), noise()])
    params, state = net.init(KEY, X)
    equal(params, net.init(KEY, jnp.zeros_like(X))[0])
    other = jax.random.key(9)
    assert abs(params[0] - net.init(other, X)[0][0]).min() > 0
    y = [net.apply(params, state, X, train=True, key=key)[0] for key in (KEY, KEY, other)]
    equal(y[0], y[1])
    assert abs(y[0] - y[2]).min() > 0


def test_in_evaluation_no_layer_gets_a_key():
    """`noise` asserts it; here inside of chain and repeat."""
    for unroll in (True, False):
        net = fdg.chain([noise(), fdg.repeat(fdg.chain([noise()]), 2, unroll=unroll)])
        equal(net.apply(*net.init(KEY, X), X, train=False, key=None)[0], X)


BLOCKS = {
    "dense": dense,
    "noise": noise,
    "statistics": statistics,
    "chain": lambda: fdg.chain([dense(), noise(), statistics()]),
    "repeat": lambda: fdg.repeat(fdg.chain([dense(), noise()]), 2),
}


def train(net, params, state):
    """Output, new state, and gradients of weights and input."""

    def loss(params, x):
        y, new = net.apply(params, state, x, train=True, key=KEY)
        return jnp.sum(y**2), (y, new)

    grad, aux = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, X)
    return aux, grad


@pytest.mark.parametrize("block", BLOCKS)
def test_scanned_and_unrolled_repeat_are_the_same(block):
    nets = [fdg.repeat(BLOCKS[block](), 3, unroll=unroll) for unroll in (True, False, None)]
    starts = [net.init(KEY, X) for net in nets]
    equal(starts[0], starts[1])
    equal(starts[0], starts[2])
    results = [train(net, *starts[0]) for net in nets]
    close(results[0], results[1])
    close(results[0], results[2])
    evaluated = [net.apply(*starts[0], X, train=False, key=None) for net in nets]
    close(evaluated[0], evaluated[1])


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_repeat_is_a_chain_of_equal_layers_with_stacked_params_and_state(block, unroll):
    layer = BLOCKS[block]()
    net, chain = fdg.repeat(layer, 3, unroll=unroll), fdg.chain([layer] * 3)
    assert net.size == chain.size == 3 * layer.size
    stacked, separate = net.init(KEY, X), chain.init(KEY, X)

    def stack(parts):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    close(stacked, tuple(stack(part) for part in separate))
    (y, state), (grad, dx) = train(net, *stacked)
    (want_y, want_state), (want_grad, want_dx) = train(chain, *separate)
    close((y, state, grad, dx), (want_y, stack(want_state), stack(want_grad), want_dx))


@pytest.mark.parametrize("unroll", [True, False])
def test_each_repeated_layer_has_its_own_batch_statistics(unroll):
    shift = fdg.from_fn(lambda x: x + 2)
    net = fdg.repeat(fdg.chain([shift, statistics()]), 2, unroll=unroll)
    params, state = net.init(KEY, X)
    _, trained = net.apply(params, state, X, train=True, key=KEY)
    mean = trained[1]["mean"]
    assert mean.shape == (2, 3)
    close(mean, jnp.stack([0.5 * X.mean(0) + 1, jnp.full(3, 1.0)]))
    _, evaluated = net.apply(params, trained, X, train=False, key=None)
    equal(evaluated, trained)


@pytest.mark.parametrize("unroll", [True, False, None])
@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (dense(5), r"float64\[4, 3\] to float64\[4, 5\]"),
        (fdg.from_fn(lambda x: x.astype(jnp.float32)), r"float64\[4, 3\] to float32\[4, 3\]"),
        (fdg.from_fn(lambda x: (x, x)), r"float64\[4, 3\] to \("),
    ],
    ids=["shape", "dtype", "structure"],
)
def test_a_repeated_layer_must_keep_its_inputs_shape(layer, shapes, unroll):
    with pytest.raises(ValueError, match=rf"must keep its input's shape.*{shapes}.*outside"):
        fdg.repeat(layer, 2, unroll=unroll).init(KEY, X)


@pytest.mark.parametrize("n", [0, -1])
def test_a_layer_is_repeated_at_least_once(n):
    with pytest.raises(ValueError, match=f"n={n}"):
        fdg.repeat(dense(), n)


def test_an_empty_chain_is_refused():
    with pytest.raises(ValueError, match=r"layers=\[\]"):
        fdg.chain([])


def test_a_chain_refuses_params_of_another_length():
    with pytest.raises(ValueError, match="shorter"):
        fdg.chain([noise(), noise()]).apply(((),), ((),), X, train=False, key=None)


@pytest.mark.parametrize("make", [dense, lambda: fdg.repeat(dense(), 2)])
def test_old_style_keys_are_taken_as_well(make):
    net = fdg.chain([make(), noise()])
    params, state = net.init(jax.random.PRNGKey(7), X)
    equal(params, net.init(KEY, X)[0])
    y = [
        net.apply(params, state, X, train=True, key=key)[0] for key in (jax.random.PRNGKey(7), KEY)
    ]
    equal(*y)
