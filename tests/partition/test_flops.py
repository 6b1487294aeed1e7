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


def test_of_branches_the_largest_counts():
    def branches(*lengths):
        forms = [loop(n) for n in lengths]
        return flops(lambda x: jax.lax.switch(x[0, 0].astype(int), forms, x), X)

    assert branches(12, 3) == pytest.approx(12 * ONE, rel=0.01)
    assert branches(3, 12, 7) == pytest.approx(12 * ONE, rel=0.01)
    assert flops(lambda x: jax.lax.cond(x[0, 0] > 0, loop(5), lambda x: x, x), X) == pytest.approx(
        5 * ONE, rel=0.01
    )


@pytest.mark.parametrize(("begin", "end", "step", "times"), [(0, 12, 1, 12), (1, 12, 4, 3)])
def test_a_while_loop_that_counts(begin, end, step, times):
    def f(x):
        body = lambda carry: (carry[0] + step, layer(carry[1])[0])  # noqa: E731
        return jax.lax.while_loop(lambda carry: carry[0] < end, body, (begin, x))[1]

    assert flops(f, X) == pytest.approx(times * ONE, rel=0.01)


def test_a_while_loop_of_unknown_length_counts_once():
    def f(x):
        return jax.lax.while_loop(lambda h: h[0, 0] < 9, lambda h: layer(h)[0], x)

    assert flops(f, X) == pytest.approx(ONE, rel=0.01)


def test_a_loop_in_a_derivative_of_its_own():
    @jax.custom_vjp
    def f(x):
        return loop(12)(x)

    f.defvjp(lambda x: (f(x), None), lambda _, g: (loop(12)(g),))
    assert flops(f, X) == pytest.approx(12 * ONE, rel=0.01)

    def both(x):
        y, vjp = jax.vjp(f, x)
        return y, vjp(y)

    assert flops(both, X) == pytest.approx(24 * ONE, rel=0.01)


def test_operations_count_as_their_formulas_say():
    """Two for a product and a sum, one for an operation of each element."""
    assert flops(lambda x: jnp.einsum("bi,io->bo", x, W), X) == pytest.approx(2 * 8 * 16 * 16, 0.01)
    assert flops(lambda x: x * 2 + 1, X) == pytest.approx(2 * 8 * 16, 0.01)
    images, kernel = jnp.ones((2, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
    inside = flops(lambda x: jax.lax.conv(x, kernel, (1, 1), "VALID"), images)
    assert inside == pytest.approx(2 * (2 * 4 * 6 * 6) * (3 * 9), 0.01)
