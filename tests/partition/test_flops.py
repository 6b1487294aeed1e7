"""FLOPs with every iteration of a loop."""

import jax
import jax.numpy as jnp
import pytest

from fdg_jax.partition.flops import flops

W = jnp.ones((16, 16))
X = jnp.ones((8, 16))


def layer(h, _=None):
    return jnp.tanh(h @ W), None


def loop(n, unroll=1):
    return lambda x: jax.lax.scan(layer, x, length=n, unroll=unroll)[0]


ONE = flops(lambda x: layer(x)[0], X)


def test_a_loop_counts_as_often_as_it_runs():
    assert ONE >= 2 * 8 * 16 * 16
    assert flops(loop(12), X) == pytest.approx(12 * ONE, rel=0.01)
    for unroll in (4, 5, 12, 20):
        assert flops(loop(12, unroll), X) == pytest.approx(12 * ONE, rel=0.01)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap])
def test_inside_other_transformations(wrap):
    x = X[None] if wrap is jax.vmap else X
    assert flops(wrap(loop(12)), x) == pytest.approx(12 * ONE, rel=0.01)


def test_loops_in_loops():
    def outer(h, _):
        return loop(5)(h), None

    nested = flops(lambda x: jax.lax.scan(outer, x, length=3)[0], X)
    assert nested == pytest.approx(15 * ONE, rel=0.01)


def test_forward_and_backward():
    def both(f):
        return flops(lambda x: jax.vjp(f, x)[1](x), X)

    assert both(loop(12)) == pytest.approx(12 * both(loop(1)), rel=0.1)
    fori = both(lambda x: jax.lax.fori_loop(0, 12, lambda _, h: layer(h)[0], x))
    assert fori == pytest.approx(12 * both(loop(1)), rel=0.1)


def test_the_largest_branch_counts():
    def one_of(*branches):
        return flops(lambda x: jax.lax.switch(0 * x[0, 0].astype(int), branches, x), X)

    assert one_of(loop(1), lambda x: x) == pytest.approx(ONE, rel=0.01)
    assert one_of(loop(12), lambda x: x) == pytest.approx(12 * ONE, rel=0.01)
    # XLA adds one body of the other branch, and no more.
    for branches in ((loop(5), loop(12)), (loop(12), loop(5)), (loop(12), loop(12))):
        assert 12 * ONE <= one_of(*branches) <= 13.01 * ONE


def test_without_loops_it_is_what_xla_says():
    def f(x):
        return jnp.sum(jax.nn.relu(x @ W) @ W)

    assert flops(f, X) == jax.jit(f).lower(X).cost_analysis()["flops"]
