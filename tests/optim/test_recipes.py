"""The tuned optimizers: what they are made of, and what they are without staleness."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import optim, recipes
from tests.optim.recursion import rate, trained

CLIP = optax.clip_by_global_norm(0.5)
MASK = {"kernel": True, "bias": False}
MUON = {
    "beta": 0.9,
    "adam_b1": 0.9,
    "adam_b2": 0.95,
    "muon_weight_dimension_numbers": optim.muon_dimension_numbers(),
}


PLAIN = {
    "sgd": (
        lambda late, **own: recipes.sgd(rate, late, weight_decay=5e-4, clip_norm=0.5, **own),
        optax.chain(CLIP, optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9)),
    ),
    "adamw": (
        lambda late, **own: recipes.adamw(rate, late, mask=MASK, clip_norm=0.5, **own),
        optax.chain(CLIP, optax.adamw(rate, b2=0.95, weight_decay=0.1, mask=MASK)),
    ),
    "muon": (
        lambda late, **own: recipes.muon(rate, late, clip_norm=0.5, **own),
        optax.chain(CLIP, optax.contrib.muon(rate, **MUON)),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_without_staleness_a_recipe_is_the_plain_optimizer_bit_for_bit(name):
    recipe, plain = PLAIN[name]
    jax.tree.map(np.testing.assert_array_equal, trained(recipe(0)), trained(plain))


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_recipe_does_about_staleness(name):
    recipe, plain = PLAIN[name]
    if name == "sgd":
        want = optax.chain(CLIP, fdg.delayed_sgd(rate, 0.9, 4, stretch=2.0, weight_decay=5e-4))
    elif name == "muon":
        m = fdg.stretched_momentum(0.9, 4, 0.3).momentum
        inner = optax.contrib.muon(rate, **{**MUON, "beta": m, "adam_b1": m})
        want = fdg.predict_weights(optax.chain(CLIP, inner), 4, "last_update")
    else:
        want = fdg.predict_weights(plain, 4, "last_update")
    jax.tree.map(np.testing.assert_array_equal, trained(recipe(4)), trained(want))
    assert not np.allclose(trained(recipe(4))["bias"], trained(plain)["bias"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_recipe_without_horizon_needs_no_buffer(name):
    recipe, _ = PLAIN[name]
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    bare, whole = (
        sum(leaf.size for leaf in jax.tree.leaves(recipe(4, horizon=horizon).init(params)))
        for horizon in (None, 1.0)
    )
    assert whole - bare == 16


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_the_mask_leaves_out_does_not_decay(name):
    make = recipes.adamw if name == "adamw" else recipes.muon
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4), "token": jnp.ones((3, 4))}
    zero = jax.tree.map(jnp.zeros_like, params)
    for mask in ({"kernel": True, "bias": False, "token": False}, optim_mask):
        optimizer = make(0.1, 0, weight_decay=0.5, mask=mask)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
        np.testing.assert_array_equal(updates["bias"], 0.0)
        np.testing.assert_array_equal(updates["token"], 0.0)


def optim_mask(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_shrinking_is_foreseen(name):
    recipe, plain = PLAIN[name]
    stretch = {"stretch": 0.0} if name == "muon" else {}
    want = fdg.predict_weights(optax.chain(plain, optax.scale(0.125)), 4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13),
        trained(recipe(4, scale=0.125, **stretch)),
        trained(want),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipes.adamw(0.1, 2, b1=1.5), "b1=1.5: must be a number"),
        (lambda: recipes.adamw(0.1, 2, weight_decay=-1), "weight_decay=-1"),
        (lambda: recipes.muon(0.1, 2, momentum=1.0), "momentum=1.0"),
        (lambda: recipes.sgd(0.1, 2, clip_norm=-1), "clip_norm=-1"),
        (lambda: recipes.muon(0.1, 2, scale=0), "scale=0"),
        (lambda: recipes.muon(0.1, 2, anneal_steps=0), "anneal_steps=0"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_rate_of_a_recipe_can_begin_lower(name):
    recipe, _ = PLAIN[name]
    annealed = trained(recipe(4, anneal_steps=100), steps=1)
    at_once = trained(recipe(4), steps=1)
    start = trained(recipe(4), steps=0)
    share = 4.0 if name == "adamw" else 2.0  # its whole staleness, and its root
    for key, value in start.items():
        np.testing.assert_allclose(
            (at_once[key] - value) / (annealed[key] - value), share, rtol=1e-6
        )


def test_muon_takes_kernels_and_adam_the_rest_at_its_own_rate():
    slow = trained(recipes.muon(0.1, 0, adam_learning_rate=0.01), steps=1)
    fast = trained(recipes.muon(0.1, 0), steps=1)
    start = trained(recipes.muon(0.1, 0), steps=0)
    np.testing.assert_array_equal(slow["kernel"], fast["kernel"])
    np.testing.assert_allclose(
        10 * (slow["bias"] - start["bias"]), fast["bias"] - start["bias"], rtol=1e-6
    )


def test_what_muon_is_to_leave_out_goes_to_adam():
    slow = trained(recipes.muon(0.1, 0, exclude="kernel", adam_learning_rate=0.01), steps=1)
    plain = trained(optax.nadam(0.01, b1=0.9, b2=0.95), steps=1)
    np.testing.assert_allclose(slow["kernel"], plain["kernel"], rtol=0, atol=1e-6)
