"""convert: the same network and optimizer state, cut elsewhere."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import reference
from fdg_jax.checkpoint.repartition import convert
from fdg_jax.engine.nonfinite import SKIPPED, fresh
from fdg_jax.errors import NonFiniteError
from fdg_jax.layer import batch_key
from tests import networks

DATA = networks.batches(12)
X = DATA[0][0]
# Stages begin in front of, inside and behind the repeated blocks.
CUTS = {1: [], 2: [4], 3: [2, 5]}


def every(k):
    """Copies of the params of every kind, one of them masked, and counts."""
    return optax.chain(
        fdg.fdg_shrink(0.5, k),
        optax.masked(optax.trace(0.9), lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)),
        optax.ema(0.5),
        optax.add_noise(1e-3, 0.5, key=jax.random.key(3)),
        optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(0.01, 30)),
    )


def make(schedule, optimizer=None, cuts=None, dropping=True, **options) -> fdg.Pipeline:
    k = schedule.num_stages
    layers = networks.network(dropping=dropping)
    stages = fdg.partition(layers, k, X, cost=CUTS[k] if cuts is None else cuts)
    optimizer = optimizer or networks.sgd(1.0, k)
    return fdg.Pipeline(stages, networks.loss_fn, optimizer, schedule, **options)


def train(pipe, state, data):
    for batch in data:
        state, _ = pipe.step(state, batch)
    return state


def start(pipe):
    return pipe.init(jax.random.key(7), X)


def values(state):
    """Everything that a drained state has, as numpy."""
    assert not any(s.flights.items() or s.versions.items() or s.pending for s in state.stages)
    counts = [(s.version, s.base, int(s.number)) for s in state.stages]
    arrays = [(s.params, s.model_state, s.opt_state) for s in state.stages]
    return (state.tick, state.origin, counts), jax.tree.map(numbers, arrays)


def numbers(array):
    key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if key else array)


def assert_same(a, b):
    assert a[0] == b[0]
    assert jax.tree.structure(a[1]) == jax.tree.structure(b[1])
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def test_there_and_back_is_the_same_state():
    three = make(fdg.schedule.fdg(3), every)
    state, rng = start(three), np.random.default_rng(0)

    def scattered(array):
        if not array.ndim:
            return array
        return jax.device_put(rng.normal(size=array.shape).astype(array.dtype), array.sharding)

    stages = [
        stage._replace(
            **{
                name: jax.tree.map(scattered, getattr(stage, name))
                for name in ("params", "model_state", "opt_state")
            }
        )
        for stage in state.stages
    ]
    state = state._replace(stages=tuple(stages))
    expected = values(state)
    for schedule in (fdg.schedule.ddg(2), fdg.schedule.backprop(1)):
        other = make(schedule, every, devices=jax.devices())
        state = convert(three, state, other, X)
        for stage, own in zip(other.stages, state.stages, strict=True):
            arrays = [v for v in jax.tree.leaves(own) if isinstance(v, jax.Array)]
            assert all(v.devices() == set(stage.mesh.devices.flat) for v in arrays)
        state = convert(other, state, three, X)
        assert_same(values(state), expected)


def test_stages_that_share_a_device_share_no_buffer():
    """Each donates its own."""
    source = make(fdg.schedule.fdg(3))
    target = make(fdg.schedule.fdg(2), devices=jax.devices()[:1])
    state = start(source)
    counts = [s.opt_state for s in state.stages]
    state = convert(source, state, target, X)
    arrays = jax.tree.leaves([(s.params, s.opt_state, s.number) for s in state.stages])
    buffers = [v.unsafe_buffer_pointer() for v in [*arrays, *jax.tree.leaves(counts)]]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 2)])
def test_where_nothing_is_delayed_another_number_of_stages_changes_nothing(before, after):
    pipes = [make(fdg.schedule.backprop(k)) for k in (before, after)]
    state = train(pipes[0], start(pipes[0]), DATA[:3])
    state = train(pipes[1], convert(pipes[0], state, pipes[1], X), DATA[3:6])
    never = train(pipes[1], start(pipes[1]), DATA[:6])
    ours, theirs = values(state), values(never)
    assert ours[0][0] == theirs[0][0] == 6
    assert networks.difference(ours[1], theirs[1]) <= 1e-12


def test_one_stage_goes_on_as_a_plain_loop():
    three, one = make(fdg.schedule.fdg(3)), make(fdg.schedule.backprop(1))
    state = convert(three, train(three, start(three), DATA[:6]), one, X)
    (tick, _, _), [(params, model_state, opt_state)] = values(state)
    network, optimizer = fdg.chain(networks.network()), one.stages[0].optimizer

    @jax.jit
    def step(params, model_state, opt_state, n, x, labels):
        def loss(params):
            key = batch_key(jax.random.key(7), n)
            y, left = network.apply(params, model_state, x, train=True, key=key)
            return networks.loss_fn(y, labels)[0], left

        gradient, model_state = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), model_state, opt_state

    for n, (x, labels) in enumerate(DATA[tick:], tick):
        params, model_state, opt_state = step(params, model_state, opt_state, n, x, labels)
    ours = values(train(one, state, DATA[tick:]))[1]
    assert networks.difference(ours, [(params, model_state, opt_state)]) <= 1e-12


@pytest.mark.parametrize(
    "schedule",
    [
        fdg.schedule.fdg(2),
        fdg.schedule.pipedream_2bw(2, accumulate=2),
        fdg.schedule.gpipe(2, microbatches=2),
    ],
    ids=lambda schedule: schedule.name,
)
def test_other_stages_go_on_as_the_oracle_from_there(schedule):
    three = make(fdg.schedule.adl(3, accumulate=2), networks.sgd(0.5, 3), dropping=False)
    two = make(schedule, networks.sgd(0.5, 2), dropping=False)
    state = convert(three, train(three, start(three), DATA[:5]), two, X)
    arrays = values(state)[1]

    def optimizer(k):  # begins where it stands
        return optax.GradientTransformation(
            lambda params: arrays[k][2], two.stages[k].optimizer.given.update
        )

    stages = fdg.partition(networks.network(dropping=False), 2, X, cost=CUTS[2])
    params, model_state = ([own[i] for own in arrays] for i in (0, 1))
    expected = reference.train(
        stages, networks.loss_fn, optimizer, schedule, params, model_state, state.key, DATA[5:]
    )
    state, _ = two.drain(train(two, state, DATA[5:]))
    assert networks.difference(two.params(state), expected.params) <= 1e-12
    left = [stage.model_state for stage in state.stages]
    assert networks.difference(left, expected.model_state) <= 1e-12


def test_what_is_not_finite_is_looked_for_as_the_other_pipeline_does():
    pipes = [make(fdg.schedule.fdg(2), on_nonfinite=name) for name in ("skip", "ignore", "stop")]
    first, last = start(pipes[0]).stages
    record = first.record.at[SKIPPED].set(3)
    state = start(pipes[0])._replace(stages=(first._replace(record=record), last))
    records = []
    for source, target in itertools.pairwise([*pipes, pipes[0]]):
        state = convert(source, state, target, X)
        records.append([None if s.record is None else s.record.tolist() for s in state.stages])
    clean = fresh().tolist()
    assert records == [[None, None], [clean, clean], [clean, clean]]


def test_a_source_that_is_to_stop_stops():
    source = make(fdg.schedule.backprop(1), on_nonfinite="stop")
    state = train(source, start(source), [(np.full_like(X, np.nan), DATA[0][1])])
    with pytest.raises(NonFiniteError):
        convert(source, state, make(fdg.schedule.fdg(2)), X)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_batches_and_updates_are_counted_on(microbatches):
    """Five batches in groups of three are two updates, in every stage."""
    source = make(fdg.schedule.adl(3, accumulate=3))
    target = make(fdg.schedule.gpipe(2, microbatches=microbatches))
    state = convert(source, train(source, start(source), DATA[:5]), target, X)
    tick, origin, counts = values(state)[0]
    assert (tick, origin) == (5, 5)
    assert counts == [(2, 2, 5 * microbatches)] * 2


def refused(network=None, optimizer=None, **options) -> fdg.Pipeline:
    stages = fdg.partition(network or networks.network(), 2, X, cost=[3])
    optimizer = optimizer or networks.sgd(1.0, 2)
    return fdg.Pipeline(stages, networks.loss_fn, optimizer, fdg.schedule.fdg(2), **options)


def memory(k):
    """State whose arrays look like the params but are no copies of them."""
    return optax.GradientTransformation(
        lambda params: optax.TraceState(jax.tree.map(lambda p: jnp.zeros((3, *p.shape)), params)),
        lambda updates, state, params=None: (updates, state),
    )


OTHERS = {
    "more layers": (
        {"network": [*networks.network(), fdg.from_fn(jnp.tanh)]},
        "target: has 11 layers, source has 10; both must cut one network",
    ),
    "another width": (
        {"network": [*networks.network()[:-1], networks.dense(5)]},
        r"target: params of layer 9: bias is float64\[3\] in one and float64\[5\] in the other",
    ),
    "another layer": (
        {"network": [*networks.network()[:-2], networks.batch_norm(), networks.network()[-1]]},
        "target: has 5 layers, source has 10",
    ),
    "another optimizer": (
        {"optimizer": lambda k: optax.adam(0.1)},
        r"target: its optimizer and that of source differ in opt_state\[2\]\[0\].trace;",
    ),
    "another dtype": (
        {
            "optimizer": lambda k: optax.chain(
                fdg.fdg_shrink(1.0, k),
                optax.identity(),
                optax.sgd(lambda count: 0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16),
            )
        },
        r"target: opt_state.*trace of layer 0: bias is float64\[6\] in one and bfloat16\[6\]",
    ),
    "other optimizers in its stages": (
        {"optimizer": lambda k: optax.sgd(0.1, momentum=0.9 if k else None)},
        r"optimizer: its state has opt_state\[0\]\.trace in stage 1, and nothing in stage 0",
    ),
    "no copies": ({"optimizer": memory}, r"trace.*has shape \(3, 6\), its parameter \(6,\)"),
    "no trees": (
        {
            "optimizer": lambda k: optax.GradientTransformation(
                lambda p: p[0], lambda u, s, p: (u, s)
            )
        },
        r"optimizer: what in its state mirrors the params cannot be told from the rest",
    ),
}


@pytest.mark.parametrize(("options", "message"), OTHERS.values(), ids=OTHERS)
def test_what_has_no_place_in_the_other_pipeline_is_refused(options, message):
    source, target = make(fdg.schedule.fdg(2)), refused(**options)
    state = train(source, start(source), DATA[:2])
    with pytest.raises(ValueError, match=message) as caught:
        convert(source, state, target, X)
    assert "\n" not in str(caught.value)
    source.drain(state)  # it is whole


def test_stages_that_have_not_made_the_same_number_of_updates_are_refused():
    pipe = make(fdg.schedule.fdg(2))
    state = start(pipe)
    first, last = state.stages
    later = jax.tree.map(lambda v: v + 1 if v.ndim == 0 else v, last.opt_state)
    state = state._replace(stages=(first, last._replace(opt_state=later)))
    with pytest.raises(ValueError, match=r"state: opt_state.*count is 0, 1 in its stages after"):
        convert(pipe, state, pipe, X)


def test_weight_prediction_begins_anew_from_the_true_weights():
    def pipe(k):
        schedule = fdg.schedule.fdg(k)

        def optimizer(stage):
            late = schedule.staleness(stage)
            labels = lambda p: jax.tree.map(lambda leaf: "ab"[leaf.ndim % 2], p)  # noqa: E731
            return optax.partition(
                {
                    "a": fdg.delayed_sgd(0.05, 0.9, late),
                    "b": fdg.predict_weights(optax.adam(0.05), late),
                },
                labels,
            )

        return make(schedule, optimizer)

    source, target = pipe(3), pipe(2)
    state, _ = source.drain(train(source, start(source), DATA))
    weights, params = (jax.device_get(find(state)) for find in (source.true_params, source.params))
    assert networks.difference(weights, params) > 1e-3
    moved = convert(source, state, target, X)
    for found in (target.params(moved), target.true_params(moved)):
        joined = [jax.tree.leaves(tree) for tree in (found, weights)]
        assert len(joined[0]) > 4
        flat = [np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in joined]
        np.testing.assert_array_equal(np.sort(flat[0]), np.sort(flat[1]))
    # Momentum and moments went along: training goes on.
    state, _ = target.drain(train(target, moved, networks.batches(4)))
    assert networks.difference(target.true_params(state), target.params(state)) > 1e-6
