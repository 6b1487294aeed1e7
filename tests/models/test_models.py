"""The networks: sizes as published, shapes, names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import models
from tests.thinned import thinned

IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def parameters(name: str, **options) -> int:
    network = fdg.chain(models.create(name, **options))
    params, _ = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), IMAGE)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "millions", "digits"),
    [
        ("resnet20", 0.27, 2),
        ("resnet32", 0.46, 2),
        ("resnet44", 0.66, 2),
        ("resnet56", 0.85, 2),
        ("resnet110", 1.7, 1),
        ("resnet1202", 19.4, 1),
        ("resnet18", 11.2, 1),
        ("resnet34", 21.3, 1),
        ("resnet50", 23.5, 1),
        ("resnet101", 42.5, 1),
        ("wrn28_10", 36.5, 1),
        ("small_resnet", 0.3, 1),
        ("plain16", 0.59, 2),
    ],
)
def test_number_of_parameters_is_the_published_one(name, millions, digits):
    assert round(parameters(name) / 1e6, digits) == millions


@pytest.mark.parametrize(
    "name",
    thinned(
        ["small_resnet", "resnet20", "resnet18", "resnet50", "wrn16_1", "small_revnet", "revnet18"],
        keep=3,
    ),
)
def test_outputs_are_logits_whatever_the_image(name):
    for shape, channels, classes in (((2, 32, 32, 3), 3, 10), ((3, 28, 28, 1), 1, 7)):
        network = fdg.chain(models.create(name, classes, channels))
        x = jax.ShapeDtypeStruct(shape, jnp.float32)

        def forward(x, network=network):
            params, state = network.init(jax.random.key(0), x)
            return network.apply(params, state, x, train=True, key=jax.random.key(1))[0]

        assert jax.eval_shape(forward, x).shape == (shape[0], classes)


def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros():
    block = models.block.PadShortcut(2, 4, 2)
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    y = block(x)
    assert y.shape == (1, 2, 2, 4)
    assert (y[..., 1:3] == x[:, ::2, ::2]).all()
    assert (y[..., 0] == 0).all()
    assert (y[..., 3] == 0).all()


def test_first_logits_have_the_scale_of_one():
    """He initialisation keeps the variance: neither vanishing nor exploding outputs."""
    network = fdg.chain(models.create("small_resnet"))
    x = jax.random.normal(jax.random.key(0), (16, 16, 16, 3), jnp.float32)

    @jax.jit
    def forward(x):
        params, state = network.init(jax.random.key(1), x)
        return network.apply(params, state, x, train=True, key=jax.random.key(2))[0]

    y = forward(x)
    assert 0.2 < float(y.std()) < 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet21", "model='resnet21': allowed are .*resnet20"),
        ("wrn29_10", "depth=29: a wide ResNet has depth 6n\\+4"),
        ("wrn28_0", "widen=0"),
    ],
)
def test_unknown_networks_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        models.create(name)


def test_dropout_changes_training_alone_and_only_where_a_network_has_it():
    """In one block, the second layer; at rate 0 it has the weights of the network without."""
    x = jax.random.normal(jax.random.key(0), (4, 4, 4, 16), jnp.float32)

    def outputs(**options):
        block = models.create("wrn10_1", **options)[1]
        params, state = block.init(jax.random.key(1), x)
        train = jax.jit(lambda key: block.apply(params, state, x, train=True, key=key)[0])
        noisy = [np.asarray(train(jax.random.key(n))) for n in (2, 2, 3)]
        return noisy, np.asarray(block.apply(params, state, x, train=False, key=None)[0])

    (first, again, other), calm = outputs(dropout=0.3)
    assert (first == again).all()
    assert (first != other).any()
    (plain, _, same), evaluated = outputs()
    assert (plain == same).all()
    assert (calm == evaluated).all()
    with pytest.raises(ValueError, match=r"dropout=0\.1: small_resnet has none; give 0, or a wide"):
        models.create("small_resnet", dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout=1: must lie in \[0, 1\)"):
        models.create("wrn10_1", dropout=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet1202", "wrn28_10"])
def test_the_deepest_and_the_widest_network_take_eight_fdg_ticks(name):
    """K = 4, scanned on CPU so that it compiles in minutes; every stage updates at least once."""
    layers = models.create(name, unroll=False)
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    labels = np.array([3, 7])

    def loss_fn(outputs, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return losses.mean(), {}

    pipe = fdg.Pipeline(
        fdg.partition(layers, 4, x),
        loss_fn,
        lambda k: optax.sgd(0.01, momentum=0.9),
        fdg.schedule.fdg(4),
        max_ahead=1,
    )
    state = pipe.init(jax.random.key(0), x)
    initial = jax.device_get(pipe.params(state))
    losses = []
    for _ in range(8):
        state, metrics = pipe.step(state, (x, labels))
        losses += [float(m.loss) for m in metrics]
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    assert [stage.version for stage in state.stages] == [2, 3, 4, 5]
    for before, after in zip(initial, pipe.params(state), strict=True):
        changed = jax.tree.map(lambda a, b: bool((a != np.asarray(b)).any()), before, after)
        assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("name", thinned(["small_resnet", "wrn10_1", "plain16"], keep=3))
def test_own_derivatives_are_those_of_jax(name):
    def run(compute):
        network = fdg.chain(models.create(name, compute=compute))
        x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3), jnp.float64)
        params, state = network.init(jax.random.key(1), x)
        params, state = jax.tree.map(lambda v: v.astype(jnp.float64), (params, state))

        def loss(params):
            y, new = network.apply(params, state, x, train=True, key=jax.random.key(2))
            return jnp.sum(jnp.sin(y)), new

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    ours, theirs = run(models.Compute()), run(models.Compute(fast=False))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", thinned(["small_resnet", "wrn10_1", "small_revnet"], keep=3))
def test_half_precision_is_of_activations_alone(name, fast):
    layers = models.create(name, compute=models.Compute(jnp.bfloat16, fast))
    x = jnp.ones((2, 8, 8, 3), jnp.float32)
    for i, layer in enumerate(layers):
        params, state = layer.init(jax.random.key(0), x)
        assert {v.dtype for v in jax.tree.leaves(params)} <= {jnp.dtype(jnp.float32)}
        x, new = layer.apply(params, state, x, train=True, key=jax.random.key(1))
        assert {v.dtype for v in jax.tree.leaves(new)} <= {jnp.dtype(jnp.float32)}
        dtype = jnp.bfloat16 if i < len(layers) - 1 else jnp.float32
        assert {v.dtype for v in jax.tree.leaves(x)} == {jnp.dtype(dtype)}
