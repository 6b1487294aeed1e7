"""The largest stable rate on a quadratic whose gradients are late, by simulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.polynomial import polynomial

import fdg_jax as fdg
from tests.thinned import thinned

# Largest stable learning rate times curvature: heavy ball with momentum 0.9, delay d everywhere.
TABLE = {
    1: {"none": 0.100, "nesterov": 0.253, "spike": 0.253, "linear": 0.270, "momentum": 0.253},
    2: {"none": 0.0513, "nesterov": 0.0807, "spike": 0.114, "linear": 0.121, "momentum": 0.114},
    4: {"none": 0.0265, "nesterov": 0.0327, "spike": 0.0483, "linear": 0.0494, "momentum": 0.0483},
    6: {"none": 0.0182, "nesterov": 0.0208, "spike": 0.0292, "linear": 0.0286, "momentum": 0.0292},
    14: {
        "none": 0.00843,
        "nesterov": 0.00890,
        "spike": 0.0111,
        "linear": 0.00918,
        "momentum": 0.0111,
    },
}
# With the momentum stretched under linear prediction, lr / (1 - m) kept: d = 6, by momentum.
STRETCHED = {0.9: 0.0286, 0.95: 0.0409, 0.98: 0.0669, 0.99: 0.0970}
STEPS = 30_000


def optimizer(name: str, d: int, momentum: float = 0.9) -> optax.GradientTransformation:
    """With a learning rate of 1, so that the curvature is the rate times it."""
    return {
        "none": lambda: optax.sgd(1.0, momentum=momentum),
        "nesterov": lambda: optax.sgd(1.0, momentum=momentum, nesterov=True),
        "spike": lambda: optax.chain(
            fdg.scale_by_spike_compensation(momentum, d), optax.scale(-1.0)
        ),
        "linear": lambda: fdg.delayed_sgd(1.0, momentum, d, stretch=0, spike=False),
        "momentum": lambda: fdg.predict_weights(optax.sgd(1.0, momentum=momentum), d, "momentum"),
        "last_update": lambda: fdg.predict_weights(optax.sgd(1.0, momentum=momentum), d),
        "error_feedback": lambda: optax.chain(
            optax.sgd(1.0, momentum=momentum), fdg.error_feedback(d)
        ),
    }[name]()


@functools.partial(jax.jit, static_argnames=("name", "d", "momentum"))
def growth(curvatures: jax.Array, name: str, d: int, momentum: float = 0.9) -> jax.Array:
    """How much larger the parameters are in the last than in the second third of a run."""
    rule = optimizer(name, d, momentum)
    third = STEPS // 3

    def step(carry, t):
        x, state, past, sizes = carry
        gradient = curvatures * past[t % d]
        past = past.at[t % d].set(x)
        updates, state = rule.update(gradient, state, x)
        x = jnp.clip(x + updates, -1e100, 1e100)
        sizes = sizes.at[t // third].max(jnp.abs(x))
        return (x, state, past, sizes), None

    start = jnp.ones_like(curvatures)
    past, sizes = jnp.ones((d, *start.shape)), jnp.zeros((3, *start.shape))
    (_, _, _, sizes), _ = jax.lax.scan(
        step, (start, rule.init(start), past, sizes), jnp.arange(STEPS)
    )
    return sizes[2] / sizes[1]


def largest_stable(guess: float, *case) -> float:
    """By simulation, of rates around a guess."""
    curvatures = jnp.linspace(0.9 * guess, 1.1 * guess, 201)
    stable = np.asarray(growth(curvatures, *case)) < 1
    assert stable[0], "the threshold lies below of what was tried"
    assert not stable[-1], "the threshold lies above of what was tried"
    return float(curvatures[np.flatnonzero(stable).max()])


def exact(name: str, d: int, m: float = 0.9) -> float:
    """The same from the roots of the characteristic polynomial.

    With q a delay of one update and updates u = N(q) / (1 - m q) of the gradients, the parameters
    follow (1 - q)(1 - m q) + h q^(d + 1) N(q) = 0, stable where all roots lie outside of the unit
    circle.
    """
    spike = (1 - m**d) / (1 - m)
    ahead = {"linear": d, "momentum": m * spike}.get(name, 0)
    numerator = {
        "none": [1.0],
        "nesterov": [1 + m, -m],
        "spike": [m**d + spike, -spike * m],
    }.get(name, [1 + ahead, -ahead])
    own = polynomial.polymul([1, -1], [1, -m])

    def stable(h: float) -> bool:
        late = polynomial.polymul([0.0] * (d + 1) + [h], numerator)
        return bool((np.abs(polynomial.polyroots(polynomial.polyadd(own, late))) > 1).all())

    low, high = 1e-4, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if stable(middle) else (low, middle)
    return low


@pytest.mark.parametrize("d", thinned(TABLE, keep=3))
def test_the_largest_stable_rates_of_the_remedies(d):
    for name, want in TABLE[d].items():
        found = largest_stable(want, name, d)
        assert found == pytest.approx(want, rel=0.03), name
        assert found == pytest.approx(exact(name, d), rel=0.01), name


@pytest.mark.parametrize("name", ["last_update", "error_feedback"])
def test_prediction_by_the_last_update_is_the_linear_one_at_a_constant_rate(name):
    for d in (1, 6):
        want = TABLE[d]["linear"]
        assert largest_stable(want, name, d) == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize("momentum", STRETCHED)
def test_a_longer_momentum_makes_prediction_stable_at_larger_rates(momentum):
    # The rate that goes with momentum 0.9 and the same lr / (1 - m).
    factor = (1 - momentum) / 0.1
    found = largest_stable(STRETCHED[momentum] * factor, "linear", 6, momentum) / factor
    assert found == pytest.approx(STRETCHED[momentum], rel=0.03)
    assert found == pytest.approx(exact("linear", 6, momentum) / factor, rel=0.01)
