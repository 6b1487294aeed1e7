"""One network, written three times: as a linen module, an nnx module and two plain functions.

Dense, batch norm, tanh, dense; in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import fdg_jax as fdg

KEY, OTHER = jax.random.key(1), jax.random.key(2)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        double = {"param_dtype": jnp.float64, "rngs": rngs}
        self.a, self.b = nnx.Linear(3, 4, **double), nnx.Linear(4, 3, **double)
        self.n = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-5, **double)

    def __call__(self, x):
        return self.b(jnp.tanh(self.n(self.a(x))))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        double = {"param_dtype": jnp.float64}
        x = linen.Dense(4, name="a", **double)(x)
        norm = linen.BatchNorm(momentum=0.9, epsilon=1e-5, name="n", **double)
        x = norm(x, use_running_average=not train)
        return linen.Dense(3, name="b", **double)(jnp.tanh(x))


def plain_apply(params, state, x, *, train, key):
    a, b, n = params["a"], params["b"], params["n"]
    x = x @ a["kernel"] + a["bias"]
    seen = {"mean": x.mean(0), "var": x.var(0)} if train else state
    x = (x - seen["mean"]) / jnp.sqrt(seen["var"] + 1e-5) * n["scale"] + n["bias"]
    new = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * now, state, seen) if train else state
    return jnp.tanh(x) @ b["kernel"] + b["bias"], new


def weights(key):
    """Parameters and batch statistics of the network, for the layers of all three kinds."""
    rows = jax.random.normal(key, (12, 4))
    params = {
        "a": {"kernel": rows[:3], "bias": rows[3]},
        "n": {"scale": rows[4], "bias": rows[5]},
        "b": {"kernel": rows[6:10, :3], "bias": rows[10, :3]},
    }
    stats = {"mean": rows[11], "var": rows[5] ** 2 + 0.5}
    kinds = [
        (fdg.from_linen(LinenNet()), {"batch_stats": {"n": stats}}),
        (fdg.from_nnx(NnxNet), {"n": stats}),
        (fdg.Layer(lambda key, x: (params, stats), plain_apply), stats),
    ]
    return params, kinds


def close(a, b):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-12, atol=1e-12), a, b)


@pytest.mark.parametrize("train", [True, False])
def test_linen_nnx_and_plain_layers_agree_with_the_same_weights(train):
    x = jax.random.normal(KEY, (8, 3))
    params, kinds = weights(OTHER)
    results = []
    for layer, state in kinds:
        own, own_state = layer.init(KEY, x)
        shapes = jax.tree.map(jnp.shape, params)
        assert jax.tree.map(jnp.shape, own) == shapes
        assert jax.tree.structure(own_state) == jax.tree.structure(state)

        def loss(params, x, layer=layer, state=state):
            y, new = layer.apply(params, state, x, train=train, key=KEY if train else None)
            return jnp.sum(y**2), (y, jax.tree.leaves(new))

        grad, aux = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        results.append((grad, aux))
    for result in results[:2]:
        close(result, results[2])


def test_linen_nnx_and_plain_networks_of_the_same_weights_take_the_same_path():
    """Through FDG with two stages: losses, parameters and batch statistics after every tick."""
    batches = [(jax.random.normal(k, (8, 3)), jnp.ones(3)) for k in jax.random.split(KEY, 20)]
    both = [weights(key) for key in jax.random.split(OTHER)]
    paths = []
    for kind in range(3):
        stages = []
        for params, kinds in both:
            layer, state = kinds[kind]
            start = (params, state)
            stages.append(fdg.Layer(lambda key, x, start=start: start, layer.apply))
        pipe = fdg.Pipeline(
            stages,
            lambda y, t: (jnp.mean((y - t) ** 2), {}),
            lambda k: optax.chain(fdg.fdg_shrink(0.5, 1 - k), optax.sgd(0.1, momentum=0.9)),
            fdg.schedule.fdg(2),
        )
        state, path = pipe.init(KEY, batches[0][0]), []
        for batch in batches:
            state, metrics = pipe.step(state, batch)
            model_state = jax.tree.leaves([own.model_state for own in state.stages])
            path.append(jax.device_get((metrics, pipe.params(state), model_state)))
        paths.append(path)
    losses = [metrics[0].loss for metrics, *_ in paths[2][1:]]
    assert losses[-1] < losses[0]
    for path in paths[:2]:
        close(path, paths[2])
