"""Devices become one mesh per stage."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.engine.placement import stage_meshes


def groups(num_stages, devices):
    """Device numbers of each stage; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meshes = stage_meshes(num_stages, devices)
    return [[device.id for device in mesh.devices.flat] for mesh in meshes]


@pytest.mark.parametrize(
    ("num_stages", "num_devices", "want"),
    [
        (1, 1, [[0]]),
        (1, 4, [[0, 1, 2, 3]]),
        (2, 2, [[0], [1]]),
        (2, 4, [[0, 1], [2, 3]]),
        (4, 4, [[0], [1], [2], [3]]),
        (3, 1, [[0], [0], [0]]),
        (3, 2, [[0], [0], [1]]),
        (4, 2, [[0], [0], [1], [1]]),
        (4, 3, [[0], [0], [1], [2]]),
        (8, 4, [[0], [0], [1], [1], [2], [2], [3], [3]]),
    ],
)
def test_contiguous_groups_of_equal_size_or_neighbours_that_share(num_stages, num_devices, want):
    assert groups(num_stages, jax.devices()[:num_devices]) == want


@pytest.mark.parametrize(
    ("num_stages", "num_devices", "want"),
    [(2, 3, [[0], [1]]), (3, 4, [[0], [1], [2]])],
)
def test_what_is_left_over_stays_unused_with_a_warning(num_stages, num_devices, want):
    with pytest.warns(UserWarning, match=f"{num_devices} do not divide into {num_stages}.*1 stay"):
        meshes = stage_meshes(num_stages, jax.devices()[:num_devices])
    assert [[device.id for device in mesh.devices.flat] for mesh in meshes] == want


def test_devices_are_taken_in_the_order_given():
    assert groups(2, jax.devices()[::-1]) == [[3, 2], [1, 0]]


@pytest.mark.parametrize(("num_stages", "want"), [(1, [[0]]), (3, [[0], [1], [2]])])
def test_by_default_one_device_per_stage_without_a_warning(num_stages, want):
    assert groups(num_stages, None) == want


def test_no_device_is_refused():
    with pytest.raises(ValueError, match=r"devices=\[\]"):
        stage_meshes(2, [])


def test_a_device_named_twice_is_refused():
    first = jax.devices()[0]
    with pytest.raises(ValueError, match="named twice"):
        stage_meshes(2, [first, first])


def test_parameters_are_born_on_their_stages_devices():
    """Through the pipeline: stage k's parameters on group k, and nowhere else."""
    layer = fdg.Layer(lambda key, x: (jnp.ones(3), ()), lambda p, s, x, *, train, key: (p * x, s))
    pipe = fdg.Pipeline(
        [layer, layer],
        lambda y, t: (jnp.mean((y - t) ** 2), {}),
        lambda k: optax.sgd(0.1),
        fdg.schedule.fdg(2),
        devices=jax.devices(),
    )
    params = pipe.params(pipe.init(jax.random.key(0), jnp.ones((4, 3))))
    assert [{device.id for device in p.devices()} for p in params] == [{0, 1}, {2, 3}]
