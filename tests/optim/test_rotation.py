"""Basis rotation against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from tests.optim.recursion import gradient, rate, run, start

B1, B2, EPS, EVERY = 0.9, 0.95, 1e-3, 3


class Matrix:
    """One matrix, by hand."""

    def __init__(self, shape, sides):
        rows, columns = shape
        self.left = sides == "both" or rows <= columns
        self.right = sides == "both" or rows > columns
        self.L, self.R = np.zeros((rows, rows)), np.zeros((columns, columns))
        self.QL, self.QR = np.eye(rows), np.eye(columns)
        self.M, self.V, self.t = np.zeros(shape), np.zeros(shape), 0

    def turn(self, average, q, axis):
        if self.t == 0:
            return np.linalg.eigh(average)[1][:, ::-1]
        order = np.argsort(-np.diag(q.T @ average @ q), kind="stable")
        self.V = np.take(self.V, order, axis)
        return np.linalg.qr(average @ q[:, order])[0]

    def update(self, g):
        if self.left:
            self.L = B2 * self.L + (1 - B2) * g @ g.T
        if self.right:
            self.R = B2 * self.R + (1 - B2) * g.T @ g
        if self.t % EVERY == 0:
            if self.left:
                self.QL = self.turn(self.L, self.QL, 0)
            if self.right:
                self.QR = self.turn(self.R, self.QR, 1)
        self.t += 1
        self.M = B1 * self.M + (1 - B1) * g
        self.V = B2 * self.V + (1 - B2) * (self.QL.T @ g @ self.QR) ** 2
        first, second = 1 - B1**self.t, 1 - B2**self.t
        step = (self.QL.T @ self.M @ self.QR / first) / (np.sqrt(self.V / second) + EPS)
        return self.QL @ step @ self.QR.T


@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
def test_a_matrix(shape, sides):
    optimizer = fdg.scale_by_basis_rotation(B1, B2, EPS, EVERY, sides)
    hand, state, x = Matrix(shape, sides), optimizer.init(jnp.zeros(shape)), start(shape)
    for step in range(12):
        g = gradient(x, step) + 0.3 * np.random.default_rng(step).normal(size=shape)
        found, state = optimizer.update(jnp.asarray(g), state)
        want = hand.update(g)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-11)
        x = x - 0.1 * want


def test_stacked_matrices_are_many_matrices():
    optimizer = fdg.scale_by_basis_rotation(B1, B2, EPS, EVERY)
    stacked, state = start((2, 3, 4)), None
    singles = [optimizer.init(jnp.zeros((3, 4))) for _ in range(2)]
    state = optimizer.init(jnp.zeros((2, 3, 4)))
    for step in range(7):
        g = gradient(stacked, step)
        found, state = optimizer.update(jnp.asarray(g), state)
        for i in range(2):
            alone, singles[i] = optimizer.update(jnp.asarray(g[i]), singles[i])
            np.testing.assert_allclose(found[i], alone, rtol=0, atol=1e-9)


def test_vectors_get_adam():
    chain = optax.chain(
        fdg.scale_by_basis_rotation(B1, B2, EPS), optax.scale_by_learning_rate(rate)
    )
    found, _ = run(chain, 2)
    want, _ = run(optax.adam(rate, B1, B2, EPS), 2)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)


def test_it_does_not_matter_in_which_basis_the_rows_are_written():
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    optimizer = fdg.scale_by_basis_rotation(B1, B2, EPS, EVERY)
    plain = turned = optimizer.init(jnp.zeros((3, 5)))
    for step in range(9):
        g = gradient(start((3, 5)), step) * (1 + np.arange(3))[:, None]
        u, plain = optimizer.update(jnp.asarray(g), plain)
        v, turned = optimizer.update(jnp.asarray(turn @ g), turned)
        np.testing.assert_allclose(v, turn @ u, rtol=0, atol=1e-6)


def test_structure_shapes_and_dtypes_of_the_state_stay():
    params = {"matrix": jnp.ones((3, 4), jnp.float32), "vector": jnp.ones(3, jnp.float32)}
    optimizer = fdg.scale_by_basis_rotation(sides="both")
    before = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(params, before)
    assert jax.tree.map(jnp.result_type, before) == jax.tree.map(jnp.result_type, after)
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    assert updates["matrix"].dtype == jnp.float32
    assert before.left["vector"].shape == ()
    assert before.right["matrix"].shape == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 1}, "b1=1: must be a number"),
        ({"b2": -0.1}, "b2=-0.1"),
        ({"every": 0}, "every=0: must be a number of updates"),
        ({"sides": "left"}, "sides='left': allowed are 'one' and 'both'"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fdg.scale_by_basis_rotation(**arguments)


def test_half_precision_is_rotated_in_single_and_a_fresh_state_can_be_donated():
    params = jnp.asarray(start((3, 4)), jnp.bfloat16)
    optimizer = fdg.scale_by_basis_rotation()
    state = optimizer.init(params)
    assert state.left.dtype == jnp.float32
    updates, state = jax.jit(optimizer.update, donate_argnums=1)(params, state)
    assert updates.dtype == state.mu.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(updates).all())


def test_only_what_is_included_is_rotated():
    params = {"kernel": jnp.asarray(start((3, 4))), "bias": jnp.asarray(start((3, 4)))}
    optimizer = fdg.scale_by_basis_rotation(include="kernel")
    state = optimizer.init(params)
    assert state.left["bias"].shape == ()
    updates, _ = optimizer.update(params, state)
    np.testing.assert_allclose(np.abs(updates["bias"]), 1, rtol=1e-6)
    assert np.abs(np.abs(updates["kernel"]) - 1).max() > 0.01
