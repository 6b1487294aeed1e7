"""Tied weights: the pipeline against the oracle, and against one shared table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import reference
from tests import networks
from tests.thinned import thinned

TOKENS, LENGTH, BATCH = 11, 5, 8
KEY = jax.random.key(7)


def embedding() -> fdg.Layer:
    def init(key, x):
        return {"table": 0.4 * jax.random.normal(key, (TOKENS, networks.WIDTH))}, ()

    def apply(params, state, x, *, train, key):
        return params["table"][x].mean(1), state

    return fdg.Layer(init, apply)


def head(*, transposed: bool) -> fdg.Layer:
    def init(key, x):
        shape = (x.shape[-1], TOKENS) if transposed else (TOKENS, x.shape[-1])
        return {"bias": jnp.zeros(TOKENS), "kernel": jax.random.normal(key, shape)}, ()

    def apply(params, state, x, *, train, key):
        kernel = params["kernel"] if transposed else params["kernel"].T
        return x @ kernel + params["bias"], state

    return fdg.Layer(init, apply)


def layers(*, transposed: bool = False) -> list[fdg.Layer]:
    hidden = [networks.dense(networks.WIDTH), networks.batch_norm(), networks.dropout()]
    return [embedding(), *hidden, networks.dense(networks.WIDTH), head(transposed=transposed)]


def batches(count: int):
    rng = np.random.default_rng(0)
    shapes = (BATCH, LENGTH), BATCH
    return [tuple(rng.integers(0, TOKENS, shape) for shape in shapes) for _ in range(count)]


DATA = batches(12)


def stages(num_stages: int, **options) -> fdg.Partition:
    return fdg.partition(layers(**options), num_stages, DATA[0][0], cost=[1] * 6)


def tied(*, transposed: bool = False):
    return fdg.tie(0, 5, "table", "kernel", transpose=transposed)


def pipeline(num_stages: int, schedule=None, optimizer=None, transposed=False, **options):
    return fdg.Pipeline(
        stages(num_stages, transposed=transposed),
        networks.loss_fn,
        optimizer or networks.sgd(0.9, num_stages),
        schedule or fdg.schedule.fdg(num_stages),
        tie=tied(transposed=transposed),
        **options,
    )


def assert_equals_oracle(pipe, optimizer, schedule, **options):
    start = pipe.init(KEY, *DATA[0])
    params = jax.device_get(pipe.params(start))
    model_state = jax.device_get([own.model_state for own in start.stages])
    state, metrics = networks.run(pipe, DATA, KEY)
    transposed = pipe.tie.transpose
    expected = reference.train(
        stages(pipe.num_stages, transposed=transposed),
        networks.loss_fn,
        optimizer,
        schedule,
        params,
        model_state,
        KEY,
        DATA,
        tie=pipe.tie,
        **options,
    )
    assert networks.difference([m.loss for m in metrics], expected.losses) <= 1e-12
    assert networks.difference(pipe.params(state), expected.params) <= 1e-12
    assert networks.difference(params, expected.params) > 1e-3
    return state


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("transposed", thinned([False, True], keep=3))
def test_fdg_equals_the_oracle(num_stages, transposed):
    optimizer, schedule = networks.sgd(0.9, num_stages), fdg.schedule.fdg(num_stages)
    pipe = pipeline(num_stages, transposed=transposed)
    assert_equals_oracle(pipe, optimizer, schedule)


SCHEDULES = {
    "fdg_backward_first": lambda k: fdg.schedule.fdg(k, "backward_first"),
    "ddg": fdg.schedule.ddg,
    "adl": lambda k: fdg.schedule.adl(k, accumulate=2),
    "pipedream_2bw": fdg.schedule.pipedream_2bw,
    "gpipe": lambda k: fdg.schedule.gpipe(k, microbatches=2),
    "zero_bubble": lambda k: fdg.schedule.zero_bubble(k, microbatches=2),
    "then": lambda k: fdg.schedule.then(fdg.schedule.backprop(k), 4, fdg.schedule.fdg(k)),
}


@pytest.mark.parametrize("name", thinned(SCHEDULES, keep=3))
def test_schedules_equal_the_oracle(name):
    schedule, optimizer = SCHEDULES[name](3), networks.sgd(0.9, 3)
    assert_equals_oracle(pipeline(3, schedule), optimizer, schedule)


@pytest.mark.parametrize("gradient", ["recompute_stale", "recompute", "reconstruct"])
def test_gradient_rules_equal_the_oracle(gradient):
    schedule, optimizer = fdg.schedule.fdg(3), networks.sgd(0.9, 3)
    assert_equals_oracle(pipeline(3, gradient=gradient), optimizer, schedule, gradient=gradient)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_tied_arrays_are_not_rounded(dtype):
    schedule, optimizer = fdg.schedule.fdg(3), networks.sgd(0.9, 3)
    pipe = pipeline(3, message_dtype=dtype)
    assert_equals_oracle(pipe, optimizer, schedule, message_dtype=dtype)
    slots = pipe.init(KEY, *DATA[0]).stages[2].inbox["tied"]
    assert slots.values[0].array.dtype == jnp.float64


@pytest.mark.parametrize("num_stages", [1, 3])
def test_without_staleness_it_is_ordinary_tying(num_stages):
    network = fdg.chain(layers())
    pipe = pipeline(num_stages, fdg.schedule.backprop(num_stages), lambda k: optax.adam(0.01))
    params, model_state = network.init(KEY, DATA[0][0])
    state, _ = networks.run(pipe, DATA, KEY)
    optimizer = optax.adam(0.01)
    params[5].pop("kernel")
    opt_state = optimizer.init(params)
    for n, (x, labels) in enumerate(DATA):

        def loss(params):
            last = {**params[5], "kernel": params[0]["table"]}
            full = (*params[:5], last)
            key = fdg.layer.batch_key(KEY, n)  # noqa: B023
            y, left = network.apply(full, model_state, x, train=True, key=key)  # noqa: B023
            return networks.loss_fn(y, labels)[0], left  # noqa: B023

        gradient, model_state = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    found = jax.tree.leaves([jax.device_get(own) for own in pipe.params(state)])
    assert networks.difference(found, jax.tree.leaves(params)) <= 1e-12


def test_staleness_is_that_of_the_owners_stage():
    schedule = pipeline(4).schedule
    assert [schedule.staleness(k) for k in range(4)] == [6, 4, 2, 0]
    first, *_, last = schedule.counts
    assert (first.slots["tied_gradient"], last.slots["tied"]) == (3, 3)
