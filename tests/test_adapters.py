"""from_nnx, from_linen and from_fn: modules as layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import fdg_jax as fdg

KEY, OTHER = jax.random.key(1), jax.random.key(2)
# float32, as flax keeps batch statistics.
X = jax.random.normal(jax.random.key(3), (8, 3), jnp.float32) + 1


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.dropout = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])

    def __call__(self, x):
        x = self.norm(self.dense(x))
        return jnp.stack([dropout(x) for dropout in self.dropout], axis=1)


class WithTrain(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(3)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        drop = [linen.Dropout(0.5, deterministic=not train) for _ in range(2)]
        return jnp.stack([dropout(x) for dropout in drop], axis=1)


class WithFlaxNames(linen.Module):
    @linen.compact
    def __call__(self, x, *, deterministic, use_running_average):
        x = linen.Dense(3)(x)
        x = linen.BatchNorm(momentum=0.9)(x, use_running_average=use_running_average)
        drop = [linen.Dropout(0.5) for _ in range(2)]
        return jnp.stack([dropout(x, deterministic=deterministic) for dropout in drop], axis=1)


LAYERS = {
    "nnx": lambda: fdg.from_nnx(Nnx),
    "linen train": lambda: fdg.from_linen(WithTrain()),
    "linen deterministic, use_running_average": lambda: fdg.from_linen(WithFlaxNames()),
}
each = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def moved(a, b):
    """Whether every leaf differs."""
    return all(jax.tree.leaves(jax.tree.map(lambda u, v: bool((u != v).any()), a, b)))


@each
def test_batch_statistics_move_once_per_training_call_and_never_in_evaluation(make):
    layer = make()
    params, state = layer.init(KEY, X)
    leaves = jax.tree.leaves(state)
    assert sorted(float(leaf[0]) for leaf in leaves) == [0.0, 1.0]  # mean and variance, untouched
    _, once = layer.apply(params, state, X, train=True, key=KEY)
    assert moved(state, once)
    # One step of the moving average, not two: (1 - 0.9) of the batch's mean.
    dense = next(value for name, value in params.items() if "ense" in name)
    mean = (X @ dense["kernel"] + dense["bias"]).mean(0)
    got = jax.tree.leaves(once)[0]
    np.testing.assert_allclose(got, 0.1 * mean, rtol=1e-4, atol=1e-6)
    _, still = layer.apply(params, once, X, train=False, key=None)
    equal(still, once)


@each
def test_a_state_in_numpy_is_left_as_it_was(make):
    layer = make()
    params, state = layer.init(KEY, X)
    host = jax.tree.map(np.array, state)  # copies, which can be written into
    y, new = layer.apply(params, host, X, train=True, key=KEY)
    equal(host, state)
    equal((y, new), layer.apply(params, state, X, train=True, key=KEY))


@each
def test_evaluation_uses_the_running_statistics_and_drops_nothing(make):
    layer = make()
    params, state = layer.init(KEY, X)
    state = jax.tree.map(lambda leaf: jnp.full_like(leaf, 4.0), state)  # mean 4, deviation 2
    y, _ = layer.apply(params, state, X, train=False, key=None)
    dense = next(value for name, value in params.items() if "ense" in name)
    want = (X @ dense["kernel"] + dense["bias"] - 4) / 2
    np.testing.assert_allclose(y, jnp.stack([want, want], 1), rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("jit", [False, True])
def test_dropout_follows_the_key(make, jit):
    layer = make()
    params, state = layer.init(KEY, X)

    def apply(key):
        return layer.apply(params, state, X, train=True, key=key)[0]

    apply = jax.jit(apply) if jit else apply
    first, same, other = apply(KEY), apply(KEY), apply(OTHER)
    equal(first, same)
    kept, kept_otherwise = first != 0, other != 0
    assert 0.2 < kept.mean() < 0.8
    assert (kept != kept_otherwise).any()
    # Two dropouts of one module do not drop the same.
    assert (kept[:, 0] != kept[:, 1]).any()


@each
def test_what_comes_back_has_the_layout_that_went_in(make):
    """So that a training step can be jitted once and its state donated."""
    layer = make()
    params, state = layer.init(KEY, X)
    assert all(type(tree) is dict for tree in (params, state))
    _, new = layer.apply(params, state, X, train=True, key=KEY)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), new) == jax.tree.map(
        lambda v: (v.shape, v.dtype), state
    )


@each
def test_initial_weights_follow_the_key(make):
    layer = make()
    kernels = [jax.tree.leaves(layer.init(key, X)[0]) for key in (KEY, KEY, OTHER)]
    equal(kernels[0], kernels[1])
    assert any(bool((a != b).any()) for a, b in zip(kernels[0], kernels[2], strict=True))


@each
@pytest.mark.parametrize("unroll", [True, False])
def test_a_module_can_be_repeated(make, unroll):
    net = fdg.repeat(fdg.chain([make(), fdg.from_fn(lambda y: y.sum(1))]), 2, unroll=unroll)
    params, state = net.init(KEY, X)
    assert {leaf.shape[0] for leaf in jax.tree.leaves((params, state))} == {2}
    y, new = net.apply(params, state, X, train=True, key=KEY)
    assert y.shape == X.shape
    assert moved(state, new)
    for means in jax.tree.leaves(new):
        assert (means[0] != means[1]).any()


def train(layer):
    """Three pipeline steps: buffers are donated on the way."""
    pipe = fdg.Pipeline(
        [layer],
        lambda y, t: (jnp.mean((y - t[:, None]) ** 2), {}),
        lambda k: optax.sgd(0.1, momentum=0.9),
        fdg.schedule.fdg(1),
    )
    state = pipe.init(KEY, X)
    for _ in range(3):
        state, _ = pipe.step(state, (np.asarray(X), np.zeros_like(X)))
    return pipe.params(state)[0]


def test_the_users_arrays_survive_training():
    """A factory may hand out a module, or arrays, that its user goes on using."""
    module = Nnx(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    trained = train(fdg.from_nnx(lambda rngs: module))
    assert moved(before["dense"], trained["dense"])
    equal(nnx.to_pure_dict(nnx.state(module, nnx.Param)), before)
    np.testing.assert_array_equal(module.norm.mean[...], 0)
    module.eval()
    assert module(X).shape == (8, 2, 3)


def test_an_nnx_layer_is_the_module_it_was_made_from():
    module, layer = Nnx(nnx.Rngs(KEY)), fdg.from_nnx(Nnx)
    params, state = layer.init(KEY, X)
    equal(params, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    module.eval()
    equal(layer.apply(params, state, X, train=False, key=None)[0], module(X))


def test_more_than_ten_nnx_submodules_stay_in_order():
    """Sorted as text, 10 would come before 2."""

    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.scales = nnx.List([nnx.Param(jnp.full((), float(i))) for i in range(12)])

        def __call__(self, x):
            for scale in self.scales:
                x = 3 * x + scale[...]
            return x

    layer, module = fdg.from_nnx(Deep), Deep(nnx.Rngs(0))
    equal(layer.apply(*layer.init(KEY, X), X, train=True, key=KEY)[0], module(X))


def test_linen_keywords_are_given_only_where_they_are_taken():
    """Built-in modules take one of them, Dense none."""
    x = jnp.ones((4, 3), jnp.float32)
    dropout = fdg.from_linen(linen.Dropout(0.5))
    params, state = dropout.init(KEY, x)
    assert (params, state) == ({}, {})
    y, _ = dropout.apply(params, state, x, train=True, key=KEY)
    assert set(np.unique(y)) == {0.0, 2.0}
    equal(dropout.apply(params, state, x, train=False, key=None)[0], x)

    norm = fdg.from_linen(linen.BatchNorm())
    params, state = norm.init(KEY, X)
    y, new = norm.apply(params, state, X, train=True, key=KEY)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    assert moved(state, new)

    dense = fdg.from_linen(linen.Dense(2))
    y, _ = dense.apply(*dense.init(KEY, X), X, train=True, key=KEY)
    assert y.shape == (8, 2)


def test_in_evaluation_no_linen_state_changes_whatever_the_module_does():
    class Counter(linen.Module):
        @linen.compact
        def __call__(self, x):
            calls = self.variable("calls", "n", lambda: jnp.zeros((), jnp.int32))
            if not self.is_initializing() and self.is_mutable_collection("calls"):
                calls.value += 1
            return x

    layer = fdg.from_linen(Counter())
    params, state = layer.init(KEY, X)
    assert layer.apply(params, state, X, train=True, key=KEY)[1] == {"calls": {"n": 1}}
    assert layer.apply(params, state, X, train=False, key=None)[1] == {"calls": {"n": 0}}


def test_linen_weights_are_those_of_the_module():
    module = linen.Dense(2)
    params, _ = fdg.from_linen(module).init(KEY, X)
    equal(params, module.init(KEY, X)["params"])


@pytest.mark.parametrize("train", [True, False])
def test_a_function_is_a_layer_without_parameters(train):
    layer = fdg.from_fn(jnp.tanh)
    assert layer.init(KEY, X) == ((), ())
    y, state = layer.apply((), (), X, train=train, key=KEY if train else None)
    equal(y, jnp.tanh(X))
    assert state == ()
