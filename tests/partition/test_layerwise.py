"""Params by stages and layer by layer."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fdg_jax as fdg
from fdg_jax.layer import Chain
from fdg_jax.partition.layerwise import difference, join, separate
from fdg_jax.repeat import Repeat
from tests import networks

ONE = fdg.from_fn(abs)
NETWORKS = st.recursive(
    st.just(ONE),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(fdg.chain),
        st.tuples(inner, st.integers(1, 3)).map(lambda pair: fdg.repeat(*pair)),
    ),
    max_leaves=6,
)


def numbered(layer: fdg.Layer, count=None):
    """Params that are the layers' numbers, laid out as the network's."""
    count = itertools.count() if count is None else count
    if isinstance(layer, Chain):
        return tuple(numbered(inner, count) for inner in layer.layers)
    if isinstance(layer, Repeat):
        equal = [numbered(layer.layer, count) for _ in range(layer.times)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *equal)
    return {"w": np.full(2, next(count))}


@given(NETWORKS)
def test_layers_are_numbered_through_and_joined_again(network):
    tree = numbered(network)
    parts = separate(network, tree)
    assert [part["w"].tolist() for part in parts] == [[i, i] for i in range(network.size)]
    again = join(network, parts)
    assert difference(again, tree) is None
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_cuts_inside_of_a_repeat_do_not_show():
    layers, x = networks.network(), networks.batches(1)[0][0]
    key = jax.random.key(3)
    whole = fdg.chain(layers)
    expected = separate(whole, whole.init(key, x)[0])
    assert len(expected) == whole.size == 10
    for cuts in ([3], [2, 4], [4, 5, 6]):
        stages = fdg.partition(layers, len(cuts) + 1, x, cost=cuts)
        cut = fdg.chain(stages)
        jax.tree.map(np.testing.assert_array_equal, separate(cut, cut.init(key, x)[0]), expected)


TWICE = fdg.chain([ONE, fdg.repeat(ONE, 2)])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (({},), r"a chain of 2 layers has a tuple of as many, and this is tuple"),
        ([{}, {}], r"and this is list"),
        (({}, {"w": np.zeros((3, 1))}), r"stacked along a first axis of 2, .* is \[3, 1\]"),
        (({}, {"w": np.zeros(())}), r"is \[\]"),
    ],
)
def test_another_layout_is_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        separate(TWICE, tree)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{}, {}], "2 do not make 3 layers"),
        ([{}, {"w": np.zeros(2)}, {"w": np.zeros(3)}], r"w is float64\[3\] in one and float64\[2"),
        ([{}, {"w": np.zeros(2)}, {}], r"w is missing in one and float64\[2\] in the other"),
        ([{}, (), {}], r"one is PyTreeDef\(\{\}\), the other PyTreeDef\(\(\)\)"),
    ],
)
def test_layers_that_are_not_those_of_the_network_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        join(TWICE, parts)


def test_a_difference_names_an_array_and_not_its_value():
    a = {"w": np.zeros(2), "b": [np.zeros(3, np.float32)]}
    assert difference(a, jax.tree.map(np.ones_like, a)) is None
    assert difference(a, jax.eval_shape(lambda v: v, a)) is None
    b = {**a, "b": [np.zeros(3)]}
    assert difference(a, b) == "b/0 is float32[3] in one and float64[3] in the other"
