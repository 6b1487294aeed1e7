"""What is read from a state, and weights that are put into it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.partition import units_of
from tests import networks, test_head, test_tie

DATA = networks.batches(12)
KEY, OTHER = jax.random.key(7), jax.random.key(8)


def pipeline(num_stages, optimizer=None, schedule=None, layers=None, **options):
    layers = networks.network() if layers is None else layers
    return fdg.Pipeline(
        fdg.partition(layers, num_stages, DATA[0][0], cost=[1] * len(units_of(layers))),
        networks.loss_fn,
        networks.sgd(0.5, num_stages) if optimizer is None else optimizer,
        fdg.schedule.fdg(num_stages) if schedule is None else schedule,
        **options,
    )


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def predicting(num_stages):
    rule = fdg.schedule.fdg(num_stages)
    return pipeline(
        num_stages, lambda k: fdg.predict_weights(optax.sgd(0.1, momentum=0.9), (rule, k)), rule
    )


PIPELINES = {
    "batch norm, dropout": pipeline,
    "tied": test_tie.pipeline,
    "heads": test_head.pipeline,
    "predicted weights": predicting,
}


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_the_network_computes_what_the_pipeline_predicts(make, num_stages):
    pipe = make(num_stages)
    data = test_tie.DATA if make is test_tie.pipeline else DATA
    state = pipe.init(KEY, *data[0])
    for n, batch in enumerate(data):
        state, _ = pipe.step(state, batch)
        if n in (0, 6, len(data) - 1):  # while filling, and with mini-batches in flight
            check_network(pipe, state, data[0][0])
    state, _ = pipe.drain(state)
    check_network(pipe, state, data[0][0])


def check_network(pipe, state, x):
    params, model_state = pipe.true_params(state), pipe.model_state(state)
    assert len(params) == len(model_state) == pipe.num_stages
    host = jax.device_get((tuple(params), tuple(model_state)))
    y, after = pipe.network.apply(*host, x, train=False, key=None)
    np.testing.assert_allclose(y, pipe.predict(state, x), rtol=0, atol=1e-12)
    equal(after, host[1])
    made = jax.eval_shape(pipe.network.init, KEY, x)
    assert jax.tree.structure(made) == jax.tree.structure(host)


def test_what_is_read_says_what_training_has_changed():
    pipe = pipeline(2)
    state = pipe.init(KEY, *DATA[0])
    before = jax.device_get(pipe.model_state(state))
    for batch in DATA:
        state, _ = pipe.step(state, batch)
    assert networks.difference(before, pipe.model_state(state)) > 0.01
    equal(pipe.model_state(state), [own.model_state for own in state.stages])
    other, _ = pipe.step(state, DATA[0])
    with pytest.raises(fdg.ConsumedStateError):
        pipe.true_params(state)
    assert len(pipe.params(other)) == 2


def plain_layers():
    """Without state and noise: what comes after depends on the weights alone."""
    return [
        *(networks.dense(networks.WIDTH) for _ in range(4)),
        networks.dense(networks.CLASSES, lambda x: x),
    ]


SCHEDULES = {
    "fdg": (lambda: fdg.schedule.fdg(3), "stale"),
    "fdg, backward first": (lambda: fdg.schedule.fdg(3, order="backward_first"), "stale"),
    "recompute": (lambda: fdg.schedule.fdg(3), "recompute"),
    "adl": (lambda: fdg.schedule.adl(3, accumulate=2), "stale"),
    "pipedream": (lambda: fdg.schedule.pipedream(3), "stale"),
    "pipedream_2bw": (lambda: fdg.schedule.pipedream_2bw(3), "stale"),
    "gpipe": (lambda: fdg.schedule.gpipe(3, microbatches=2), "stale"),
    "backprop": (lambda: fdg.schedule.backprop(3), "stale"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_goes_on_as_from_fresh_weights(name):
    schedule, gradient = SCHEDULES[name]
    pipe, fresh = (
        pipeline(3, optax.sgd(0.1), schedule(), plain_layers(), gradient=gradient) for _ in range(2)
    )
    want = fresh.init(OTHER, *DATA[0])
    weights = jax.device_get(fresh.params(want))
    state, _ = networks.run(pipe, DATA[:7], KEY)
    state = pipe.replace_params(state, weights)
    equal(pipe.params(state), weights)
    for batch in DATA:
        state, _ = pipe.step(state, batch)
        want, _ = fresh.step(want, batch)
    equal(pipe.params(pipe.drain(state)[0]), fresh.params(fresh.drain(want)[0]))


def test_all_else_stays():
    pipe = pipeline(2)
    state, _ = networks.run(pipe, DATA, KEY)
    kept = jax.device_get([(own.model_state, own.opt_state, own.version) for own in state.stages])
    tick = int(state.tick)
    before = jax.tree.structure(state)
    state = pipe.replace_params(
        state, jax.tree.map(np.zeros_like, jax.device_get(pipe.params(state)))
    )
    assert jax.tree.structure(state) == before
    equal([(own.model_state, own.opt_state, own.version) for own in state.stages], kept)
    assert int(state.tick) == tick


def places(state):
    return [jax.tree.map(lambda v: v.sharding, (own.params, own.opt_state)) for own in state.stages]


@pytest.mark.parametrize("kind", [np.array, jnp.array])
@pytest.mark.parametrize("devices", [2, 4])
def test_the_users_arrays_are_copied(kind, devices):
    """On the very devices of the stages too, where a step would donate them."""
    pipe = pipeline(2, devices=jax.devices()[:devices], shard_optimizer=True)
    first = places(pipe.init(KEY, *DATA[0]))
    state, _ = networks.run(pipe, DATA[:3], KEY)
    given = [
        jax.device_put(jax.tree.map(kind, jax.device_get(own)), stage.replicated)
        if kind is jnp.array
        else jax.tree.map(kind, jax.device_get(own))
        for stage, own in zip(pipe.stages, pipe.params(state), strict=True)
    ]
    copies = jax.tree.map(np.array, jax.device_get(given))
    with jax.transfer_guard("disallow"):
        state = pipe.replace_params(state, given)
    assert places(state) == first
    for batch in DATA:
        state, _ = pipe.step(state, batch)
    state, _ = pipe.drain(state)
    assert networks.difference(copies, pipe.params(state)) > 0.001
    equal(given, copies)
    if kind is np.array:  # nor does the state see what the user writes
        state = pipe.replace_params(state, given)
        jax.tree.map(lambda v: v.fill(7), given)
        equal(pipe.params(state), copies)


OPTIMIZERS = {
    "last update": lambda where: fdg.predict_weights(optax.adam(0.01), where),
    "momentum": lambda where: fdg.predict_weights(
        optax.sgd(0.1, momentum=0.9), where, displacement="momentum"
    ),
    "delayed_sgd": lambda where: fdg.delayed_sgd(0.1, 0.9, staleness=where),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_prediction_true_weights_are_what_was_given(name):
    rule = fdg.schedule.fdg(3)
    pipe = pipeline(3, lambda k: OPTIMIZERS[name]((rule, k)), rule)
    state, _ = networks.run(pipe, DATA, KEY)
    assert networks.difference(pipe.params(state), pipe.true_params(state)) > 1e-4
    given = jax.device_get(pipe.true_params(state))
    moments = jax.device_get([own.opt_state for own in state.stages])
    state = pipe.replace_params(state, given)
    equal(pipe.true_params(state), given)
    equal(pipe.params(state), given)  # the prediction begins anew
    assert networks.difference(moments, [own.opt_state for own in state.stages]) > 0
    for batch in DATA:
        state, _ = pipe.step(state, batch)
    check_network(pipe, pipe.drain(state)[0], DATA[0][0])


@pytest.mark.parametrize("num_stages", [1, 3])
def test_tied_weights_are_given_once(num_stages):
    pipe, other = test_tie.pipeline(num_stages), test_tie.pipeline(num_stages)
    state = pipe.init(KEY, *test_tie.DATA[0])
    want = other.init(OTHER, *test_tie.DATA[0])
    weights = jax.device_get(other.params(want))
    state = pipe.replace_params(state, weights)
    np.testing.assert_allclose(
        pipe.predict(state, test_tie.DATA[0][0]),
        other.predict(want, test_tie.DATA[0][0]),
        atol=1e-12,
    )


@pytest.mark.parametrize(
    "schedule",
    [
        fdg.schedule.fdg(3),
        fdg.schedule.adl(3, accumulate=4),
        fdg.schedule.local(3),
    ],
    ids=lambda schedule: schedule.name,
)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_refused_in_flight(schedule, steps):
    losses = [networks.loss_fn] * 3 if schedule.name == "local" else networks.loss_fn
    layers = [networks.dense(networks.CLASSES) for _ in range(3)]
    pipe = fdg.Pipeline(layers, losses, optax.sgd(0.1), schedule)
    state = pipe.init(KEY, *DATA[0])
    params = jax.device_get(pipe.params(state))
    for batch in DATA[:steps]:
        state, _ = pipe.step(state, batch)
    with pytest.raises(ValueError, match=r"state: .* in flight .*; call drain first"):
        pipe.replace_params(state, params)
    state, _ = pipe.drain(state)  # and is whole
    equal(pipe.params(pipe.replace_params(state, params)), params)


def test_what_is_no_set_of_weights_is_refused():
    pipe = pipeline(2, layers=plain_layers())
    state = pipe.init(KEY, *DATA[0])
    params = jax.device_get(pipe.params(state))
    wide = jax.tree.map(lambda v: np.zeros((*v.shape, 1)), params)
    single = jax.tree.map(np.float32, params)
    number = [(dict.fromkeys(params[0][0], 0.5), *params[0][1:]), params[1]]
    wrong = {
        "params: must be 2 pytrees": [params[:1], params[0][0], iter(params), None],
        r"params: those of layers 0 to [12] differ: 0/bias is float64\[6\]": [
            wide,
            single,
            number,
        ],
        "params: those of layers 0 to . differ": [[params[1], params[0]], [(), ()]],
        "params: those of layers [23] to 4 differ: 0/bias": [[params[0], wide[1]]],
    }
    for message, given in wrong.items():
        for one in given:
            with pytest.raises(ValueError, match=message):
                pipe.replace_params(state, one)
    state, _ = pipe.step(state, DATA[0])  # nothing was consumed
    assert int(state.tick) == 1


def test_labels_among_the_inputs_are_noticed():
    pipe = pipeline(2, layers=plain_layers())
    state = pipe.init(KEY, *DATA[0])
    x, labels = DATA[0]
    with pytest.raises(ValueError, match=r"^x: the structure is \(\*, \*\), that of init's"):
        pipe.predict(state, (x, labels))
    with pytest.raises(ValueError, match=r"^inputs of the batch: the structure is \(\*, \*\)"):
        pipe.step(state, ((x, labels), labels))
    assert pipe.predict(state, x).shape[0] == len(x)


def test_they_are_printed_in_a_line():
    pipe = pipeline(2, layers=plain_layers())
    assert repr(pipe) == "<Pipeline of 2 stages, fdg, stale>"
    assert repr(pipe.init(KEY, *DATA[0])) == "<PipelineState of 2 stages, tick 0>"
    assert repr(fdg.chain(plain_layers())) == "<Chain of 5 layers>"
