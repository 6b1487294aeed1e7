"""Small networks, data and runs shared by the tests of the pipeline."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fdg_jax as fdg
from fdg_jax import reference

WIDTH, CLASSES, BATCH = 6, 3, 8


def dense(outputs: int, activation=jnp.tanh) -> fdg.Layer:
    """Dense layer in the dtype of its input."""

    def init(key, x):
        kernel = jax.random.normal(key, (x.shape[-1], outputs), x.dtype) / np.sqrt(x.shape[-1])
        return {"kernel": kernel, "bias": jnp.zeros(outputs, x.dtype)}, ()

    def apply(params, state, x, *, train, key):
        return activation(x @ params["kernel"] + params["bias"]), state

    return fdg.Layer(init, apply)


def batch_norm() -> fdg.Layer:
    """Batch normalisation with running statistics."""

    def init(key, x):
        one, zero = jnp.ones(x.shape[-1], x.dtype), jnp.zeros(x.shape[-1], x.dtype)
        return {"scale": one, "bias": zero}, {"mean": zero, "var": one}

    def apply(params, state, x, *, train, key):
        mean, var = (x.mean(0), x.var(0)) if train else (state["mean"], state["var"])
        y = (x - mean) / jnp.sqrt(var + 0.1) * params["scale"] + params["bias"]
        if train:
            state = jax.tree.map(
                lambda old, new: 0.9 * old + 0.1 * new, state, {"mean": mean, "var": var}
            )
        return y, state

    return fdg.Layer(init, apply)


def dropout(rate: float = 0.25) -> fdg.Layer:
    """Dropout; identity in evaluation."""

    def apply(params, state, x, *, train, key):
        if train:
            x = jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
        return x, state

    return fdg.Layer(lambda key, x: ((), ()), apply)


def network(*, dropping: bool = True) -> list[fdg.Layer]:
    """Seven layers: dense, batch norm, dropout, repeated dense + batch norm, dense."""
    block = fdg.chain([dense(WIDTH), batch_norm()])
    drop = [dropout()] if dropping else []
    return [dense(WIDTH), batch_norm(), *drop, fdg.repeat(block, 3), dense(CLASSES, lambda x: x)]


def merge() -> fdg.Layer:
    """Two streams side by side: a layer without an inverse."""
    return fdg.from_fn(lambda streams: jnp.concatenate(streams, axis=-1))


def reversible_network(*, dropping: bool = True) -> list[fdg.Layer]:
    """Thirteen layers: two streams, five couplings, a dense layer, four couplings."""
    drop = [dropout()] if dropping else []
    branch = fdg.chain([dense(WIDTH), batch_norm(), *drop])
    return [
        dense(2 * WIDTH),
        fdg.two_streams(),
        fdg.coupling(branch),
        fdg.repeat(fdg.coupling(branch), 2),
        *fdg.reversible(branch, dense(WIDTH)).layers,
        merge(),
        dense(2 * WIDTH),
        fdg.two_streams(),
        fdg.repeat(fdg.reversible(branch, dense(WIDTH)), 2),
        merge(),
        dense(CLASSES, lambda x: x),
    ]


def conditional() -> fdg.Layer:
    """A dense layer of the output and the label, with batch norm and noise."""
    hidden = fdg.chain([dense(8), batch_norm(), dropout()])

    def joined(pair):
        y, labels = pair
        return jnp.concatenate([y, jax.nn.one_hot(labels, CLASSES, dtype=y.dtype)], -1)

    def init(key, pair):
        params, state = hidden.init(key, joined(pair))
        out = 0.1 * jax.random.normal(key, (8, pair[0].shape[-1]), pair[0].dtype)
        return (params, out), state

    def apply(params, state, pair, *, train, key):
        h, state = hidden.apply(params[0], state, joined(pair), train=train, key=key)
        return h @ params[1], state

    return fdg.Layer(init, apply)


SYNTHESIZER = fdg.Synthesizer(conditional(), optax.adam(0.01))


def loss_fn(outputs, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()
    return loss, {"error": jnp.mean(outputs.argmax(-1) != labels)}


def batches(count: int, dtype=np.float64) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=(BATCH, 4)).astype(dtype), rng.integers(0, CLASSES, BATCH))
        for _ in range(count)
    ]


def sgd(beta: float, num_stages: int):
    """The paper's optimizer: shrinking, weight decay, momentum; the rate falls after 20 updates."""
    rate = optax.piecewise_constant_schedule(0.05, {20: 0.1})
    return lambda k: optax.chain(
        fdg.fdg_shrink(beta, num_stages - 1 - k),
        optax.add_decayed_weights(5e-4),
        optax.sgd(rate, momentum=0.9),
    )


def run(pipe: fdg.Pipeline, data, key=None):
    """Trains from the fill to the drain; the final state and every batch's metrics."""
    key = jax.random.key(7) if key is None else key
    state, metrics = pipe.init(key, data[0][0]), []
    for batch in data:
        state, m = pipe.step(state, batch)
        metrics += m
    state, rest = pipe.drain(state)
    return state, metrics + rest


def difference(a, b) -> float:
    """Largest absolute difference between two pytrees of equal structure."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs), default=0.0)


def assert_equals_oracle(
    stages,
    optimizer,
    schedule,
    data,
    loss=loss_fn,
    tolerance=1e-12,
    gradient="stale",
    message_dtype=None,
    **options,
):
    """Parameters, batch statistics and losses of a pipeline run equal those of the reference."""
    options = {"gradient": gradient, "message_dtype": message_dtype, **options}
    pipe = fdg.Pipeline(stages, loss, optimizer, schedule, **options)
    key = jax.random.key(7)
    start = pipe.init(key, *data[0])
    params = jax.device_get(pipe.params(start))
    model_state = jax.device_get([s.model_state for s in start.stages])
    state, metrics = run(pipe, data, key)
    start = (params, model_state, key, data, gradient)
    expected = reference.train(
        stages, loss, optimizer, schedule, *start, message_dtype=message_dtype
    )
    metrics = [m for m in metrics if m.stage == len(stages) - 1]
    assert [m.batch for m in metrics] == list(range(len(data)))
    assert difference([m.loss for m in metrics], expected.losses) <= tolerance
    assert difference(pipe.params(state), expected.params) <= tolerance
    assert difference([s.model_state for s in state.stages], expected.model_state) <= tolerance
    return pipe, state
