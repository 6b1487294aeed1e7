"""Reversible networks: sizes, inverses, and the blocks that have none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdg_jax as fdg
from fdg_jax import models
from fdg_jax.layer import Chain
from fdg_jax.partition import units_of
from fdg_jax.repeat import Repeat
from tests import networks
from tests.thinned import thinned

KEY = jax.random.key(3)
IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def started(layer, x):
    """Params and state in float64, with batch norm's scale and bias away from 1 and 0."""
    params, state = jax.jit(layer.init)(KEY, x)
    params, state = jax.tree.map(lambda v: v.astype(jnp.float64), (params, state))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda v: v + 0.1 * rng.normal(size=v.shape), params), state


def train(layer):
    return jax.jit(lambda p, s, x: layer.apply(p, s, x, train=True, key=None))


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        # With 1,000 classes RevNet-18 has the 12.2 million that are published.
        ("revnet18", 1000, 12_195_688),
        ("revnet34", 1000, 22_303_848),
        ("revnet50", 1000, 30_375_784),
        ("revnet18", 10, 11_180_938),
        ("revnet34", 10, 21_289_098),
        ("revnet50", 10, 26_319_754),
        ("small_revnet", 10, 315_370),
    ],
)
def test_number_of_parameters(name, classes, parameters):
    network = fdg.chain(models.create(name, classes))
    params, _ = jax.eval_shape(lambda x: network.init(KEY, x), IMAGE)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize(
    ("name", "layers", "invertible"),
    [
        ("revnet18", 10, 5),
        ("revnet34", 18, 13),
        ("revnet50", 18, 12),
        ("small_revnet", 14, 10),
    ],
)
def test_all_layers_can_be_inverted_but_stem_head_and_what_changes_the_shape(
    name, layers, invertible
):
    units = units_of(models.create(name))
    assert len(units) == layers
    assert sum(unit.inverse is not None for unit in units) == invertible


def test_a_split_into_four_has_a_stage_that_can_be_inverted():
    stages = fdg.partition(models.create("small_revnet"), 4, IMAGE)
    assert any(stage.inverse is not None for stage in stages[:-1])


@pytest.mark.parametrize("unroll", [True, False])
def test_every_group_is_undone_with_batch_norm_in_training(unroll):
    """All of small_revnet; in a scan, too, as on GPU."""
    streams = normal(0, 4, 8, 8, 16), normal(1, 4, 8, 8, 16)
    groups = 0
    for layer in models.create("small_revnet")[1:-1]:
        if layer.inverse is None:
            params, state = started(layer, streams)
        else:
            layer = fdg.repeat(layer.layer, layer.times, unroll=unroll)
            params, state = started(layer, streams)
            y, _ = train(layer)(params, state, streams)
            undo = jax.jit(lambda *a, layer=layer: layer.inverse(*a, train=True, key=None))
            assert networks.difference(undo(params, state, y), streams) < 1e-12
            groups += 1
        streams, _ = train(layer)(params, state, streams)
    assert groups == 3


@pytest.mark.parametrize("name", ["revnet18", "revnet50"])
def test_a_group_of_the_papers_network_is_undone_and_differentiated_in_one(name):
    group = next(layer for layer in models.create(name) if layer.inverse is not None)
    width = 64 if name == "revnet18" else 256
    streams = normal(0, 2, 4, 4, width), normal(1, 2, 4, 4, width)
    cotangent = normal(2, 2, 4, 4, width), normal(3, 2, 4, 4, width)
    params, state = started(group, streams)

    @jax.jit
    def both(params, state, streams, cotangent):
        y, vjp = jax.vjp(
            lambda p, x: group.apply(p, state, x, train=True, key=None)[0], params, streams
        )
        return group.reverse(params, state, y, cotangent, key=None), vjp(cotangent)

    (x, *ours), theirs = both(params, state, streams, cotangent)
    assert networks.difference(x, streams) < 1e-12
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(list(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


def conv_norm(params, x, stride=1):
    """By definition: zero padding, batch statistics."""
    kernel = params["conv"]["kernel"]
    padding = [(kernel.shape[0] // 2,) * 2] * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=numbers)
    x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
    return params["norm"]["scale"] * x + params["norm"]["bias"]


@pytest.mark.parametrize("fast", [True, False])
def test_a_basic_block_that_halves_the_image(fast):
    layer = models.create("small_revnet", compute=models.Compute(fast=fast))[2]
    assert layer.inverse is None
    x, t = normal(0, 3, 6, 6, 16), normal(1, 3, 6, 6, 16)
    params, state = started(layer, (x, t))
    first, second = train(layer)(params, state, (x, t))[0]
    reduced = conv_norm(params["first"], x, 2)
    branch = jax.nn.relu(conv_norm(params["second"], jax.nn.relu(reduced)))
    np.testing.assert_allclose(second, reduced, rtol=1e-10, atol=1e-10)
    want = branch + conv_norm(params["shortcut"], t, 2)
    np.testing.assert_allclose(first, want, rtol=1e-10, atol=1e-10)
    assert first.shape == second.shape == (3, 3, 3, 32)


@pytest.mark.parametrize(("index", "stride"), [(1, 1), (3, 2)])
def test_a_bottleneck_that_changes_the_shape(index, stride):
    """The first of RevNet-50 keeps the image's size and makes the streams 4 times as wide."""
    layer = models.create("revnet50")[index]
    assert layer.inverse is None
    inputs, outputs = (64, 256) if index == 1 else (256, 512)
    x, t = normal(0, 2, 4, 4, inputs), normal(1, 2, 4, 4, inputs)
    params, state = started(layer, (x, t))
    y = train(layer)(params, state, (x, t))[0]
    branch = x
    for name, step in (("first", 1), ("second", stride), ("third", 1)):
        branch = jax.nn.relu(conv_norm(params["branch"][name], branch, step))
    want = branch + conv_norm(params["of_t"], t, stride), conv_norm(params["of_x"], x, stride)
    assert networks.difference(y, want) < 1e-10
    assert y[0].shape == (2, 4 // stride, 4 // stride, outputs)


def test_the_head_reads_both_streams():
    layer = models.create("small_revnet")[-1]
    streams = normal(0, 2, 3, 3, 64), normal(1, 2, 3, 3, 64)
    params, state = started(layer, streams)
    y, _ = layer.apply(params, state, streams, train=True, key=None)
    dense = params[1]["dense"]
    mean = jnp.concatenate(streams, axis=-1).mean((1, 2))
    np.testing.assert_allclose(y, mean @ dense["kernel"] + dense["bias"], rtol=1e-12)


def wide(layer, times):
    """The same in float64, and every group with so many blocks."""
    if isinstance(layer, Chain):
        return fdg.chain([wide(inner, times) for inner in layer.layers])
    if isinstance(layer, Repeat):
        return fdg.repeat(wide(layer.layer, times), times)

    def init(key, x):
        return jax.tree.map(lambda v: v.astype(jnp.float64), layer.init(key, x))

    return dataclasses.replace(layer, init=init)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", thinned(["reversible", "stale"]))
def test_three_stages_of_fdg_equal_the_oracle(gradient):
    rng = np.random.default_rng(0)
    data = [(rng.normal(size=(4, 8, 8, 3)), rng.integers(0, 10, 4)) for _ in range(6)]
    pool = fdg.from_fn(lambda streams: jnp.concatenate(streams, axis=-1).mean((1, 2)))
    layers = [*(wide(layer, 2) for layer in models.create("small_revnet")[:4]), pool]
    # The first cut is within a group, the second after a block that halves the image.
    stages = fdg.partition(layers, 3, data[0][0], cost=[2, 4])
    schedule, optimizer = fdg.schedule.fdg(3), networks.sgd(0.5, 3)
    networks.assert_equals_oracle(
        stages, optimizer, schedule, data, tolerance=1e-9, gradient=gradient
    )


def test_another_depth_is_refused():
    with pytest.raises(ValueError, match="depth=20: allowed are 18, 34, 50"):
        models.revnet(20)
    with pytest.raises(ValueError, match=r"dropout=0\.1: small_revnet has none"):
        models.create("small_revnet", dropout=0.1)
