"""from_equinox: Equinox modules as layers, against Equinox itself."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import reference
from tests.thinned import thinned

equinox = pytest.importorskip("equinox")
nn = equinox.nn

KEY, OTHER = jax.random.key(1), jax.random.key(2)
X = jax.random.normal(jax.random.key(3), (8, 3)) + 1


class Block(equinox.Module):
    """Everything at once: weights, a buffer, a function, dropout and batch statistics."""

    dense: nn.Linear
    norm: nn.BatchNorm
    dropout: list[nn.Dropout]
    order: jax.Array
    act: object

    def __init__(self, key, axis_name="batch"):
        self.dense = nn.Linear(3, 4, key=key)
        self.norm = nn.BatchNorm(4, axis_name, momentum=0.9, mode="batch")
        self.dropout = [nn.Dropout(0.5), nn.Dropout(0.5)]
        self.order = jax.random.permutation(key, 4)
        self.act = jax.nn.tanh

    def __call__(self, x, state, *, key):
        x, state = self.norm(self.dense(x), state)
        keys = jax.random.split(key)
        drops = zip(self.dropout, keys, strict=True)
        return jnp.stack([d(self.act(x[self.order]), key=k) for d, k in drops]), state


class Plain(equinox.Module):
    """Without state: what its call takes is up to the test."""

    weight: jax.Array
    inference: bool = False


def plain(call, **fields):
    kind = type("Block", (Plain,), {"__call__": call, **fields, "__module__": __name__})
    return lambda key: kind(jax.random.normal(key, (3,)))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def by_equinox(x, key, train, factory=Block):
    """What Equinox's own guide does: the module, its state, vmap, a key for each example."""
    module, state = nn.make_with_state(factory)(KEY)
    module = nn.inference_mode(module, not train)
    keys = jax.random.split(key, len(x))
    call = jax.vmap(
        lambda x, s, k: module(x, s, key=k),
        axis_name="batch",
        in_axes=(0, None, 0),
        out_axes=(0, None),
    )
    y, state = call(x, state, keys)
    return module, y, jax.tree.leaves(state)


@pytest.mark.parametrize("factory", [Block, nn.make_with_state(Block)], ids=["module", "pair"])
@pytest.mark.parametrize("train", [True, False])
def test_a_layer_is_the_module_it_was_made_from(factory, train):
    layer = fdg.from_equinox(factory)
    params, state = layer.init(KEY, X)
    assert params.keys() == {"dense", "norm"}  # by attribute
    assert params["dense"].keys() == {"weight", "bias"}
    module, want, after = by_equinox(X, OTHER if train else jax.random.key(0), train)
    equal(params["dense"]["weight"], module.dense.weight)
    y, new = layer.apply(params, state, X, train=train, key=OTHER if train else None)
    equal(y, want)
    equal(new["arrays"], {"order": module.order})
    if train:
        equal(list(new["state"]), after)
        assert any(bool((a != b).any()) for a, b in zip(new["state"], state["state"], strict=True))
    else:
        equal(new, state)


def test_noise_is_each_examples_own_and_follows_the_key():
    layer = fdg.from_equinox(lambda key: nn.Dropout(0.5))
    ones = jnp.ones((8, 16))

    def apply(key):
        return layer.apply({}, {}, ones, train=True, key=key)[0]

    equal(apply(KEY), apply(KEY))
    equal(jax.jit(apply)(KEY), apply(KEY))
    assert (apply(KEY) != apply(OTHER)).any()
    assert (apply(KEY)[0] != apply(KEY)[1]).any()
    equal(layer.apply({}, {}, ones, train=False, key=None)[0], ones)
    with pytest.raises(ValueError, match="key=None: this module draws random numbers"):
        layer.apply({}, {}, ones, train=True, key=None)


def test_a_module_of_whole_batches():
    layer = fdg.from_equinox(
        plain(lambda self, x, key: (x - x.mean(0)) * self.weight), axis_name=None
    )
    params, state = layer.init(KEY, X)
    y, _ = layer.apply(params, state, X, train=True, key=KEY)
    equal(y, (X - X.mean(0)) * params["weight"])


def test_flags_are_set_and_others_refused():
    def scale(self, x, training=False, *, key=None):
        return x * (2 if training and not self.inference else 1)

    layer = fdg.from_equinox(plain(scale))
    params, state = layer.init(KEY, X)
    for train, factor in ((True, 2), (False, 1)):
        equal(layer.apply(params, state, X, train=train, key=KEY)[0], factor * X)

    hidden = plain(lambda self, x, stochastic=False: x * (2 if stochastic else 1))
    with pytest.raises(ValueError, match=r"'stochastic' .*train_kwargs=\{'stochastic': True\}"):
        fdg.from_equinox(hidden).init(KEY, X)
    named = fdg.from_equinox(hidden, train_kwargs={"stochastic": True})
    params, state = named.init(KEY, X)
    equal(named.apply(params, state, X, train=True, key=KEY)[0], 2 * X)
    equal(named.apply(params, state, X, train=False, key=None)[0], X)


class Deterministic(equinox.Module):
    deterministic: bool = False

    def __call__(self, x):
        return x if self.deterministic else 2 * x


class Static(equinox.Module):
    inner: list
    training: bool = equinox.field(static=True, default=True)

    def __call__(self, x):
        return x


def test_attributes_with_other_names_are_set_and_static_ones_refused():
    layer = fdg.from_equinox(lambda key: Deterministic())
    for train, factor in ((True, 2), (False, 1)):
        equal(layer.apply({}, {}, X, train=train, key=KEY)[0], factor * X)
    for inside in (lambda key: Static([]), lambda key: nn.Lambda(Static([]))):
        with pytest.raises(ValueError, match="Static: its static field training=True"):
            fdg.from_equinox(inside).init(KEY, X)


class Unreturned(equinox.Module):
    norm: nn.BatchNorm

    def __call__(self, x, state):
        return self.norm(x, state)[0]


class Untaken(Unreturned):
    def __call__(self, x):
        return x


def norm(axis_name):
    return nn.BatchNorm(3, axis_name, mode="batch")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (nn.Identity(), "factory: Identity is no function; give one that makes the module"),
        (lambda key: jnp.tanh, "factory: makes PjitFunction, which is no Equinox module"),
        (lambda key: norm("rows"), "axis_name='batch': BatchNorm uses an axis of another name"),
        (lambda key: Unreturned(norm("batch")), r"must return \(y, state\)"),
        (lambda key: Untaken(norm("batch")), "Untaken: has a state that its call does not take"),
        (plain(lambda self, x, mask: x), r"'mask' \(without a default\)"),
    ],
)
def test_what_does_not_fit_is_refused(factory, message):
    def use():
        layer = fdg.from_equinox(factory)
        layer.apply(*layer.init(KEY, X), X, train=True, key=KEY)

    with pytest.raises(ValueError, match=message):
        use()


def network():
    return [
        fdg.from_equinox(Block),
        fdg.from_fn(lambda y: y.sum(1)),
        fdg.repeat(fdg.from_equinox(lambda key: nn.MLP(4, 4, 8, 1, key=key)), 2),
        fdg.from_equinox(
            lambda key: nn.Sequential([nn.Linear(4, 2, key=key), nn.Lambda(jnp.tanh)])
        ),
    ]


def loss_fn(y, t):
    return jnp.mean((y - t) ** 2), {}


@pytest.mark.parametrize("num_stages", thinned([1, 2, 3], keep=3))
def test_a_pipeline_of_it_is_the_oracle(num_stages):
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(8, 3)), rng.normal(size=(8, 2))) for _ in range(6)]
    stages = fdg.partition(network(), num_stages, X)
    schedule = fdg.schedule.fdg(num_stages)
    pipe = fdg.Pipeline(stages, loss_fn, optax.sgd(0.1, momentum=0.9), schedule)
    state = pipe.init(KEY, *batches[0])
    first = jax.device_get((pipe.params(state), pipe.model_state(state)))
    for batch in batches:
        state, _ = pipe.step(state, batch)
    state, _ = pipe.drain(state)
    want = reference.train(
        stages, loss_fn, optax.sgd(0.1, momentum=0.9), schedule, *first, KEY, batches
    )
    got = jax.device_get((pipe.params(state), pipe.model_state(state)))
    for a, b in zip(
        jax.tree.leaves(got), jax.tree.leaves((want.params, want.model_state)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_one_module_in_two_layers_is_noticed():
    dense = nn.Linear(3, 3, key=KEY)
    layers = [fdg.from_equinox(lambda key: dense) for _ in range(2)]
    pipe = fdg.Pipeline(layers, loss_fn, optax.sgd(0.1), fdg.schedule.fdg(2))
    with pytest.warns(UserWarning, match="layers 0 and 1 are made of one module"):
        pipe.init(KEY, X, X)


def test_a_module_in_another_place_is_named():
    dense = nn.Linear(3, 3, key=KEY)
    with pytest.raises(ValueError, match=r"f: Linear is no function .* to fdg_jax.from_eq"):
        fdg.from_fn(dense)
    with pytest.raises(ValueError, match=r"fdg_jax.from_equinox\(lambda key: Linear\("):
        fdg.chain([dense])
    jitted = fdg.from_fn(equinox.filter_jit(jnp.tanh))
    equal(jitted.apply((), (), X, train=True, key=None)[0], jnp.tanh(X))
    assert fdg.from_equinox(equinox.filter_jit(Deterministic)) is not None


def test_the_library_needs_no_equinox():
    program = (
        "import sys; sys.modules['equinox'] = None; import fdg_jax as fdg\n"
        "fdg.from_fn(abs)\n"
        "try: fdg.from_equinox(lambda key: None)\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (
        done.stdout == "from_equinox needs Equinox, which is not installed; pip install equinox\n"
    )
