"""Corrections of single gradients against the equations in numpy."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg

RNG = np.random.default_rng(0)
NOW, THEN = ({"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=2)} for _ in range(2))
GRADIENTS = [{"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=2)} for _ in range(5)]


def corrected(transformation, params=NOW, stale=THEN):
    state, found = transformation.init(params), []
    for gradient in GRADIENTS:
        updates, state = transformation.update(gradient, state, params, stale_params=stale)
        found.append(updates)
    return found


def test_delay_compensation():
    for found, g in zip(corrected(fdg.delay_compensation(0.3)), GRADIENTS, strict=True):
        for name in g:
            expected = g[name] + 0.3 * g[name] ** 2 * (NOW[name] - THEN[name])
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-12)


def test_adaptive_delay_compensation():
    mean = {name: np.zeros_like(value) for name, value in NOW.items()}
    found = corrected(fdg.delay_compensation(0.3, adaptive=True, decay=0.9, eps=1e-7))
    for own, g in zip(found, GRADIENTS, strict=True):
        for name in g:
            mean[name] = 0.9 * mean[name] + 0.1 * g[name] ** 2
            lam = 0.3 / np.sqrt(mean[name] + 1e-7)
            expected = g[name] + lam * g[name] ** 2 * (NOW[name] - THEN[name])
            np.testing.assert_allclose(own[name], expected, rtol=0, atol=1e-12)


def test_gap_aware():
    square = {name: np.zeros_like(value) for name, value in NOW.items()}
    for t, (own, g) in enumerate(
        zip(corrected(fdg.gap_aware(0.1, decay=0.99)), GRADIENTS, strict=True), start=1
    ):
        for name in g:
            square[name] = 0.99 * square[name] + 0.01 * g[name] ** 2
            usual = 0.1 * (np.sqrt(square[name] / (1 - 0.99**t)) + 1e-8)
            expected = g[name] / (1 + np.abs(NOW[name] - THEN[name]) / usual)
            np.testing.assert_allclose(own[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fdg.delay_compensation(0.3),
        lambda: fdg.delay_compensation(0.3, adaptive=True),
        lambda: fdg.gap_aware(0.1),
    ],
)
def test_a_fresh_gradient_is_left_as_it_is(make):
    for found, g in zip(corrected(make(), stale=NOW), GRADIENTS, strict=True):
        for name in g:
            np.testing.assert_array_equal(found[name], g[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fdg.delay_compensation(-1), "lam=-1: must be 0 or more"),
        (lambda: fdg.delay_compensation(1, decay=1), "decay=1: must be in"),
        (lambda: fdg.gap_aware(0), "learning_rate=0: must be more than 0"),
        (lambda: fdg.gap_aware(1, eps=0), "eps=0: must be more than 0"),
    ],
)
def test_numbers_out_of_bounds_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda: fdg.delay_compensation(1), lambda: fdg.gap_aware(1)])
def test_without_the_old_weights_the_message_says_who_gives_them(make):
    own = make()
    with pytest.raises(ValueError, match="needs params and stale_params"):
        own.update(jnp.ones(2), own.init(jnp.ones(2)), jnp.ones(2))


def test_two_parts_are_one_chain_where_an_update_has_one_gradient():
    parts = fdg.StageOptimizer.of(
        fdg.StageOptimizer(optax.sgd(0.1, momentum=0.9), per_gradient=fdg.delay_compensation(0.3))
    )
    chain = optax.chain(fdg.delay_compensation(0.3), optax.sgd(0.1, momentum=0.9))
    states = parts.init(NOW), chain.init(NOW)
    for g in GRADIENTS:
        one, first = parts.per_gradient.update(g, states[0][0], NOW, stale_params=THEN)
        one, state = parts.update(one, (first, states[0][1]), NOW)
        two, other = chain.update(g, states[1], NOW, stale_params=THEN)
        states = state, other
        for name in g:
            np.testing.assert_array_equal(one[name], two[name])
