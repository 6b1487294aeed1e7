"""Layers that are none, or do not fit together: one line that says which, and what to do."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import fdg_jax as fdg
from tests import networks

X = jnp.ones((8, 4), jnp.float32)


def matrix(rows, columns):
    return fdg.Layer(
        lambda key, x: (jnp.ones((rows, columns), jnp.float32), ()),
        lambda p, s, x, *, train, key: (x @ p, s),
    )


def pipeline(stages):
    size = len(stages) if isinstance(stages, list) else 2
    pipe = fdg.Pipeline(stages, networks.loss_fn, networks.sgd(1, size), fdg.schedule.fdg(size))
    return pipe.init(jax.random.key(0), X)


USES = {
    "partition": lambda layers: fdg.partition(layers, 1, X),
    "cuts": lambda layers: fdg.partition(layers, 2, X, cost=[1]),
    "chain": fdg.chain,
    "pipeline": pipeline,
}
each = pytest.mark.parametrize("use", USES.values(), ids=USES)


@each
@pytest.mark.parametrize(
    ("one", "message"),
    [
        (
            nnx.Linear(3, 3, rngs=nnx.Rngs(0)),
            r"Linear is no layer; make one with .*from_nnx\(lambda",
        ),
        (nnx.Linear, r"the class Linear is no layer; make one with .*from_nnx\(lambda rngs: Lin"),
        (linen.Dense(3), r"Dense is no layer; make one with fdg_jax.from_linen\(Dense\(...\)\)"),
        (jnp.tanh, r"a function is no layer; make one with fdg_jax.from_fn"),
        ([matrix(4, 4)], r"list is no layer; make one with fdg_jax.chain"),
        (None, r"NoneType is no layer; make one with fdg_jax.Layer"),
    ],
)
def test_what_is_no_layer(use, one, message):
    with pytest.raises(ValueError, match=r"(layers|stages)\[1\]: " + message):
        use([matrix(4, 4), one])


@each
@pytest.mark.parametrize("layers", [matrix(4, 4), 3, "two", linen.Dense(3)])
def test_what_is_no_list_of_layers(use, layers):
    with pytest.raises(ValueError, match=r"(layers|stages): \w+ is no list of layers"):
        use(layers)


def test_what_is_repeated_is_a_layer():
    with pytest.raises(ValueError, match=r"layer: Dense is no layer; make one with .*from_linen"):
        fdg.repeat(linen.Dense(3), 2)


NETWORKS = {
    "pipeline": lambda layers: pipeline(layers),
    "partition": lambda layers: fdg.partition(layers, 2, X),
    "partition, time": lambda layers: fdg.partition(layers, 2, X, cost="time"),
    "cuts": lambda layers: pipeline(fdg.partition(layers, 2, X, cost=[1])),
    "chain": lambda layers: pipeline([fdg.chain(layers)]),
    "chain in a chain": lambda layers: pipeline([fdg.chain([layers[0], fdg.chain(layers[1:])])]),
}


@pytest.mark.parametrize("use", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [matrix(4, 5), matrix(6, 4), matrix(4, 4)],
            "1: fails on what layer 0 gives, float32.8,5.",
        ),
        (
            [matrix(4, 5), matrix(5, 6), matrix(7, 4)],
            "2: fails on what layer 1 gives, float32.8,6.",
        ),
        (
            [matrix(5, 5), matrix(5, 4), matrix(4, 4)],
            "0: fails on the inputs, float32.8,4.: TypeErr",
        ),
    ],
)
def test_layers_that_do_not_fit_together(use, layers, message):
    with pytest.raises(ValueError, match=f"layer {message}"):
        use(layers)


def test_modules_that_do_not_fit_together():
    nnx_layers = [
        fdg.from_nnx(lambda rngs, a=a, b=b: nnx.Linear(a, b, rngs=rngs))
        for a, b in ((4, 5), (6, 3))
    ]
    with pytest.raises(ValueError, match=r"layer 1: fails on what layer 0 gives, float32\[8,5\]"):
        pipeline(nnx_layers)
    with pytest.raises(ValueError, match=r"layer 2: fails on what layer 1 gives, float32\[8,5\]"):
        pipeline([fdg.repeat(matrix(4, 4), 1), matrix(4, 5), fdg.repeat(matrix(6, 6), 3)])


def test_inputs_of_another_shape_in_a_prediction():
    layers = [matrix(4, 3), matrix(3, 3)]
    rule = fdg.schedule.fdg(2)
    pipe = fdg.Pipeline(layers, networks.loss_fn, networks.sgd(1, 2), rule)
    state = pipe.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"layer 0: fails on the inputs, float32\[8,2\]"):
        pipe.predict(state, X[:, :2])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            fdg.Layer(lambda key, x: 1.0, lambda p, s, x, *, train, key: (x, s)),
            r"init must return \(",
        ),
        (
            fdg.Layer(lambda key, x: ((), ()), lambda p, s, x, *, train, key: x),
            r"apply must return \(",
        ),
        (
            fdg.Layer(lambda key, x: ((), ()), lambda p, s, x, *, train, key: (x, s, 1)),
            r"apply must return \(y, state\), not tuple of 3",
        ),
    ],
)
def test_functions_of_a_layer_return_pairs(layer, message):
    with pytest.raises(ValueError, match="layer 1: its " + message):
        pipeline([matrix(4, 4), layer, matrix(4, 3)])


def test_errors_of_another_kind_stay_what_they_are():
    def apply(params, state, x, *, train, key):
        raise NotImplementedError("not yet")

    with pytest.raises(NotImplementedError, match=r"^not yet"):
        pipeline([fdg.Layer(lambda key, x: ((), ()), apply)])
