"""fdg_shrink: u <- beta**hops * u, as a part of ordinary optax chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fdg_jax as fdg

inject = optax.inject_hyperparams
VARIANTS = {
    "constant": lambda beta, hops: fdg.fdg_shrink(beta, hops),
    "scheduled": lambda beta, hops: fdg.fdg_shrink(optax.constant_schedule(beta), hops),
    "injected": lambda beta, hops: inject(fdg.fdg_shrink)(beta=beta, hops=hops),
    "injected, static hops": lambda beta, hops: inject(fdg.fdg_shrink, static_args="hops")(
        beta=beta, hops=hops
    ),
    "injected schedule": lambda beta, hops: inject(fdg.fdg_shrink)(
        beta=optax.constant_schedule(beta), hops=hops
    ),
}


def run(transformation, updates, params=None, jit=False):
    """The updates that come out for a sequence of updates that goes in."""
    step = jax.jit(transformation.update) if jit else transformation.update
    state, out = transformation.init(updates[0] if params is None else params), []
    for update in updates:
        new, state = step(update, state, params)
        out.append(new)
    return out


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("beta", "hops"), [(0.7, 0), (0.7, 1), (0.7, 3), (1.0, 2), (1, 2)])
def test_multiplies_every_leaf_by_beta_to_the_hops(variant, beta, hops, jit):
    u = {"w": jnp.array([[1.0, -2.0]]), "b": (jnp.array(3.0), None)}
    [out] = run(VARIANTS[variant](beta, hops), [u], jit=jit)
    assert jax.tree.structure(out) == jax.tree.structure(u)
    jax.tree.map(lambda o, v: np.testing.assert_allclose(o, beta**hops * v, rtol=1e-14), out, u)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "rtol"), [("bfloat16", 8e-3), ("float32", 3e-7), ("float64", 0)])
def test_keeps_each_leafs_dtype(variant, dtype, rtol):
    u = {"first": jnp.ones(2, jnp.float64), "other": jnp.ones(2, dtype)}
    [out] = run(VARIANTS[variant](0.5625, 2), [u])
    assert jax.tree.map(lambda v: v.dtype, out) == jax.tree.map(lambda v: v.dtype, u)
    np.testing.assert_allclose(out["other"].astype(float), 0.5625**2, rtol=rtol)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtype_is_kept_where_all_are_narrow(variant, dtype):
    [out] = run(VARIANTS[variant](0.9, 2), [jnp.ones(2, dtype)])
    assert out.dtype == dtype


@pytest.mark.parametrize("hops", [0, 1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@given(
    u=hnp.arrays(
        np.float32, 3, elements=st.floats(width=32, allow_subnormal=False, allow_nan=False)
    )
)
def test_beta_one_is_the_identity_bit_for_bit(variant, hops, u):
    [out] = run(VARIANTS[variant](1.0, hops), [jnp.asarray(u)])
    assert np.asarray(out).tobytes() == u.tobytes()


def test_no_hops_is_the_identity_bit_for_bit():
    u = jnp.array([0.1, -0.0, 1e300, jnp.inf])
    [out] = run(fdg.fdg_shrink(0.3, 0), [u])
    assert np.asarray(out).tobytes() == np.asarray(u).tobytes()


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("how", ["direct", "injected"])
def test_beta_schedule_counts_the_updates(how, jit):
    beta = optax.linear_schedule(1.0, 0.5, 2)  # 1, 0.75, 0.5, 0.5, ...
    shrink = fdg.fdg_shrink(beta, 2) if how == "direct" else inject(fdg.fdg_shrink)(beta, 2)
    out = run(shrink, [jnp.ones(())] * 4, jit=jit)
    np.testing.assert_allclose(out, [1, 0.5625, 0.25, 0.25], rtol=1e-12)


@pytest.mark.parametrize("static_args", [(), "hops"])
def test_injected_beta_can_be_changed_between_updates(static_args):
    shrink = inject(fdg.fdg_shrink, static_args=static_args)(beta=0.5, hops=2)
    u = jnp.ones(3)
    state = shrink.init(u)
    first, state = shrink.update(u, state)
    state.hyperparams["beta"] = jnp.asarray(0.1)
    second, _ = shrink.update(u, state)
    np.testing.assert_allclose(first, 0.25)
    np.testing.assert_allclose(second, 0.01)


@pytest.mark.parametrize("beta", [0, 0.0, -0.5, 1.1, 2, float("nan"), float("inf"), np.float64(3)])
def test_beta_outside_its_range_is_named(beta):
    with pytest.raises(ValueError, match=rf"^beta={beta}: .*0 < beta <= 1"):
        fdg.fdg_shrink(beta, 1)


@pytest.mark.parametrize("beta", [0.5, optax.constant_schedule(0.5)])
def test_negative_hops_are_named(beta):
    with pytest.raises(ValueError, match=r"^hops=-1: "):
        fdg.fdg_shrink(beta, -1)


@pytest.mark.parametrize(
    ("beta", "hops"),
    [(np.float32("nan"), 1), (np.float32(2), 1), (0.5, np.int64(-1)), (0.5, -0.5)],
)
def test_wrong_numpy_scalars_are_refused_as_well(beta, hops):
    with pytest.raises(ValueError, match=r"(beta|hops)="):
        fdg.fdg_shrink(beta, hops)


def sgd(rate=0.1, momentum=0.9, decay=0.01):
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=momentum))


def gradients(n=4):
    return list(jax.random.normal(jax.random.key(0), (n, 3)))


PARAMS = jnp.array([1.0, -2.0, 3.0])


def test_in_front_it_shrinks_the_gradient_and_not_the_decay():
    g = gradients()
    out = run(optax.chain(fdg.fdg_shrink(0.5, 2), sgd()), g, PARAMS, jit=True)
    want = run(sgd(), [0.25 * v for v in g], PARAMS)
    np.testing.assert_allclose(out, want, rtol=1e-13)
    [decay_only] = run(optax.chain(fdg.fdg_shrink(0.5, 2), sgd()), [jnp.zeros(3)], PARAMS)
    np.testing.assert_allclose(decay_only, -0.1 * 0.01 * PARAMS, rtol=1e-13)


def test_behind_it_shrinks_the_decay_too():
    g = gradients()
    out = run(optax.chain(sgd(), fdg.fdg_shrink(0.5, 2)), g, PARAMS, jit=True)
    np.testing.assert_allclose(out, 0.25 * np.array(run(sgd(), g, PARAMS)), rtol=1e-13)


def test_with_momentum_alone_the_place_matters_only_where_beta_changes():
    g, momentum = gradients(), optax.sgd(0.1, momentum=0.9)

    def both(beta):
        shrink = fdg.fdg_shrink(beta, 2)
        before, after = optax.chain(shrink, momentum), optax.chain(momentum, shrink)
        return np.array(run(before, g)), np.array(run(after, g))

    np.testing.assert_allclose(*both(0.5), rtol=1e-12)
    before, after = both(optax.linear_schedule(1.0, 0.5, 3))
    assert abs(before - after)[1:].min() > 1e-4


@pytest.mark.parametrize("optimizer", [optax.adam, optax.rmsprop])
def test_an_optimizer_that_normalises_cancels_it_in_front_only(optimizer):
    g, plain = gradients(), optimizer(0.1, eps=0.0)
    want = np.array(run(plain, g))
    before = run(optax.chain(fdg.fdg_shrink(0.5, 2), plain), g)
    after = run(optax.chain(plain, fdg.fdg_shrink(0.5, 2)), g)
    np.testing.assert_allclose(before, want, rtol=1e-12)
    np.testing.assert_allclose(after, 0.25 * want, rtol=1e-12)


def test_before_adam_it_does_nothing_and_after_it_shrinks_the_rate():
    g, adam = gradients(), optax.adam(0.1)  # with its usual eps, 1e-8
    want = np.array(run(adam, g))
    before = run(optax.chain(fdg.fdg_shrink(0.5, 2), adam), g)
    after = run(optax.chain(adam, fdg.fdg_shrink(0.5, 2)), g)
    slower = run(optax.adam(0.25 * 0.1), g)
    np.testing.assert_allclose(before, want, rtol=1e-6)
    np.testing.assert_allclose(after, 0.25 * want, rtol=1e-12)
    np.testing.assert_allclose(after, slower, rtol=1e-12)


def test_before_a_clip_that_binds_it_does_nothing():
    g, clip = [10 * v for v in gradients()], optax.clip_by_global_norm(1.0)
    assert min(0.25 * np.linalg.norm(v) for v in g) > 1
    want = np.array(run(clip, g))
    np.testing.assert_allclose(run(optax.chain(fdg.fdg_shrink(0.5, 2), clip), g), want, rtol=1e-12)
    after = run(optax.chain(clip, fdg.fdg_shrink(0.5, 2)), g)
    np.testing.assert_allclose(after, 0.25 * want, rtol=1e-12)


def test_clipped_by_equal_shares_the_whole_gradient_keeps_its_bound_but_not_its_direction():
    stages = [scale * v for scale, v in zip((0.01, 1, 5, 100), gradients(4), strict=True)]
    share = optax.clip_by_global_norm(2.0 / np.sqrt(4))
    parts = [run(share, [v])[0] for v in stages]
    norms = np.linalg.norm(parts, axis=1)
    np.testing.assert_allclose(norms[2:], 1, rtol=1e-12)
    np.testing.assert_allclose(parts[0], stages[0], rtol=1e-12)
    assert norms[0] < 1
    assert np.linalg.norm(norms) <= 2
    # All over their share: the bound is met.
    full = [run(share, [100 * v])[0] for v in stages[1:]] + [run(share, [1e4 * stages[0]])[0]]
    np.testing.assert_allclose(np.linalg.norm(full), 2, rtol=1e-12)
    [whole] = run(optax.clip_by_global_norm(2.0), [stages])
    ratios = [np.linalg.norm(w) / n for w, n in zip(whole, norms, strict=True)]
    assert max(ratios) / min(ratios) > 10
