"""A rate that begins divided by the staleness."""

import jax
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from tests.optim.recursion import rate


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_rate_is_the_equation(power):
    found = jax.jit(fdg.staleness_rate(rate, 6, 20, power))
    for t in (0, 7, 20, 50):
        want = rate(t) / 6 ** (power * (1 - min(t / 20, 1)))
        np.testing.assert_allclose(found(t), want, rtol=1e-12)


def test_where_nothing_is_late_it_is_the_rate_itself():
    for late in (0, 1, (fdg.schedule.fdg(2), 1)):
        assert fdg.staleness_rate(rate, late, 20) is rate
    assert fdg.staleness_rate(0.1, 6, 20, power=0) == 0.1


def test_it_goes_where_a_learning_rate_goes():
    optimizer = optax.sgd(fdg.staleness_rate(0.1, 4, 100))
    updates, _ = optimizer.update(np.ones(1), optimizer.init(np.ones(1)))
    np.testing.assert_allclose(updates, -0.025, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.1, -1, 20), "staleness=-1"), ((0.1, 2, 0), "anneal_steps=0"), ((0.1, 2, 9, -1), "power")],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fdg.staleness_rate(*arguments)
