"""layers_of: a Sequential in layers is the Sequential."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

import fdg_jax as fdg

KEY = jax.random.key(1)
X = jax.random.normal(jax.random.key(3), (8, 3), jnp.float32) + 1


class Pair(nnx.Module):
    """Gives two outputs, which a Sequential hands on as two arguments."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return x, self.dense(x)


def make_nnx(rngs):
    return nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs),
        nnx.relu,
        nnx.BatchNorm(4, momentum=0.9, rngs=rngs),
        nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), Pair(rngs)),
        lambda x, y: {"x": x, "y": y},
        lambda y, x: x - 2 * y,
        nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(4, 2, use_bias=False, rngs=rngs),
    )


class Counter(linen.Module):
    """A Sequential of linen cannot tell its batch normalisation that the network is trained."""

    @linen.compact
    def __call__(self, x):
        calls = self.variable("calls", "n", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing() and self.is_mutable_collection("calls"):
            calls.value += 1
        return x + calls.value


def make_linen():
    return linen.Sequential(
        [
            linen.Dense(4),
            linen.relu,
            Counter(),
            linen.Sequential([linen.Dropout(0.5, deterministic=False), linen.Dense(4)]),
            lambda x: (x, 2 * x),
            lambda x, y: x * y,
            linen.Dropout(0.5, deterministic=False),
            linen.Dense(2),
        ]
    )


def first():
    return fdg.from_fn(lambda x: x + 1)


BOTH = {
    "nnx": (lambda: fdg.from_nnx(make_nnx), lambda: fdg.layers_of(make_nnx), 9),
    "linen": (lambda: fdg.from_linen(make_linen()), lambda: fdg.layers_of(make_linen()), 9),
}
each = pytest.mark.parametrize(("whole", "parts", "count"), BOTH.values(), ids=BOTH)


def equal(a, b):
    """Of two trees the same arrays in the same order, whatever their paths."""
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@each
@pytest.mark.parametrize("before", [[], [first()]], ids=["alone", "after another"])
def test_weights_noise_and_outputs_are_those_of_the_whole(whole, parts, count, before):
    layers = parts()
    assert len(layers) == count
    one, many = fdg.chain([*before, whole()]), fdg.chain([*before, *layers])
    variables, own = one.init(KEY, X), many.init(KEY, X)
    equal(variables, own)
    for train, key in ((True, KEY), (True, jax.random.key(5)), (False, None)):
        y, state = one.apply(*variables, X, train=train, key=key)
        ours, new = many.apply(*own, X, train=train, key=key)
        equal((y, state), (ours, new))


def train(layers, num_stages):
    pipe = fdg.Pipeline(
        fdg.partition(layers, num_stages, X, "flops" if num_stages == 1 else [3, 7]),
        lambda y, t: (jnp.mean((y - t) ** 2), {}),
        optax.sgd(0.1, momentum=0.9),
        fdg.schedule.backprop(num_stages),
    )
    state = pipe.init(KEY, X, X[:, :2])
    for _ in range(4):
        state, _ = pipe.step(state, (np.asarray(X), np.asarray(X[:, :2])))
    state, _ = pipe.drain(state)
    return ravel_pytree(jax.device_get((pipe.params(state), pipe.model_state(state))))[0]


@each
def test_it_trains_as_the_whole_does(whole, parts, count):
    """Over three stages, by back-propagation: dropout and batch statistics too."""
    want = train([whole()], 1)
    np.testing.assert_allclose(train(parts(), 1), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(train(parts(), 3), want, rtol=1e-5, atol=1e-6)


def test_a_part_of_the_list_keeps_its_weights():
    """Layers 2 and up as a network of their own draw as if layers 0 and 1 were before them."""
    layers = fdg.layers_of(make_nnx)
    a, b = (
        fdg.chain(layers).init(KEY, X),
        fdg.chain(layers[2:], first=2).init(KEY, jnp.ones((8, 4), jnp.float32)),
    )
    equal(a[0][2:], b[0])
    params, state = fdg.chain(layers[2:]).init(KEY, jnp.ones((8, 4), jnp.float32))
    y, _ = fdg.chain(layers[2:]).apply(
        params, state, jnp.ones((8, 4), jnp.float32), train=True, key=KEY
    )
    assert y.shape == (8, 2)


def test_only_the_layer_itself_is_computed():
    """The initial values of a layer cost what the layer's own cost."""
    factory = lambda rngs: nnx.Sequential(*[nnx.Linear(4, 4, rngs=rngs) for _ in range(20)])  # noqa: E731
    layer = fdg.layers_of(factory)[7]
    made = jax.make_jaxpr(lambda key: layer.init(key, None))(KEY)
    assert sum(op.params.get("name") == "_truncated_normal" for op in made.eqns) == 1


def test_a_module_that_is_there_begins_with_its_weights():
    module = make_nnx(nnx.Rngs(7))
    layers = fdg.layers_of(lambda rngs: module)
    params, _ = fdg.chain(layers).init(KEY, X)
    equal(params, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    train(layers, 1)
    equal(params, nnx.to_pure_dict(nnx.state(module, nnx.Param)))  # and is left alone
    with pytest.raises(ValueError, match="factory: Sequential is no function; give one that makes"):
        fdg.layers_of(module)


class Flagged(nnx.Module):
    def __call__(self, x, training=False):
        return x


class Own(nnx.Sequential):
    def __call__(self, x):
        return super().__call__(x) + x


def shared_module(rngs):
    dense = nnx.Linear(3, 3, rngs=rngs)
    return nnx.Sequential(dense, nnx.relu, dense)


DENSE = linen.Dense(3)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (lambda rngs: nnx.Linear(3, 3, rngs=rngs), "factory: makes Linear, which is no nnx.Seq"),
        (lambda rngs: 3, "factory: makes int, which is no nnx module"),
        (lambda rngs: Own(nnx.relu), "makes Own with a __call__ of its own, which is no nnx.Seq"),
        (lambda rngs: nnx.Sequential(), "factory: makes Sequential without layers"),
        (lambda rngs: nnx.Sequential(Flagged()), r"flags of its layers\[0\], Flagged"),
        (shared_module, "layers 0 and 2 of the Sequential share Param"),
        (linen.Dense(3), "sequence: Dense, which is no linen.Sequential"),
        (linen.Sequential([]), "sequence: Sequential without layers"),
        (linen.Sequential([DENSE, DENSE]), "layers 0 and 1 of the Sequential share Dense"),
        ([nnx.relu], "factory: list is no function"),
    ],
)
def test_what_is_no_sequence_of_layers_is_refused(sequence, message):
    with pytest.raises(ValueError, match=message):
        fdg.layers_of(sequence)
