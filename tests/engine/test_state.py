"""A state has one structure from init to drain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from tests import networks
from tests.thinned import thinned

DATA = networks.batches(10)
RULES = ("stale", "recompute_stale", "recompute", "reversible", "reconstruct")


def pipeline(schedule, **options) -> fdg.Pipeline:
    k = schedule.num_stages
    stages = fdg.partition(networks.network(), k, DATA[0][0], cost=[1] * 7)
    losses = networks.loss_fn
    if len(schedule.losses) > 1:
        losses = [local_loss] * (k - 1) + [networks.loss_fn]
    if schedule.predicts:
        options["synthesizers"] = networks.SYNTHESIZER
    return fdg.Pipeline(stages, losses, networks.sgd(0.5, k), schedule, **options)


def local_loss(outputs, labels):
    return networks.loss_fn(outputs[:, : networks.CLASSES], labels)


def form(state) -> tuple:
    """Structure, shapes and dtypes."""
    return jax.tree.structure(state), [(v.shape, v.dtype) for v in jax.tree.leaves(state)]


SCHEDULES = {
    **fdg.schedule.NAMED,
    "then": lambda k: fdg.schedule.then(fdg.schedule.ddg(k), 7, fdg.schedule.fdg(k)),
}


# Predictions come without what "reversible" needs.
PREDICTED = [rule for rule in RULES if rule != "reversible"]
CASES = [
    (name, (PREDICTED if name.startswith("dni") else RULES)[i % 4])
    for i, name in enumerate(SCHEDULES)
]
CASES += [("fdg", "stale"), ("fdg", "reconstruct"), ("adl", "reconstruct")]


@pytest.mark.parametrize(("name", "rule"), thinned(CASES, keep=3))
def test_structure_shapes_and_dtypes_stay(name, rule):
    pipe = pipeline(SCHEDULES[name](3), gradient=rule)
    key = jax.random.key(7)
    state = pipe.init(key, *DATA[0])
    first = form(state)
    assert form(jax.eval_shape(pipe.init, key, *DATA[0])) == first
    for step in range(1, 51):
        state, _ = pipe.step(state, DATA[step % 10])
        if step in (1, 2, 5, 50):
            assert form(state) == first
    state, _ = pipe.drain(state)
    assert form(state) == first


def test_empty_slots_hold_zeros_and_full_ones_their_number():
    pipe = pipeline(fdg.schedule.fdg(3), gradient="recompute")
    state = pipe.init(jax.random.key(7), *DATA[0])
    for batch in DATA[:2]:
        state, _ = pipe.step(state, batch)
    flights = state.stages[0].flights
    assert flights.numbers.tolist() == [0, 1, -1, -1]
    assert [n for n, _ in flights.items()] == [0, 1]
    np.testing.assert_array_equal(flights.values[1].inputs, DATA[1][0])
    assert not np.asarray(flights.values[2].inputs).any()


def test_without_example_labels_only_their_slots_get_their_shapes_later():
    pipe = pipeline(fdg.schedule.fdg(3), gradient="recompute")
    state = pipe.init(jax.random.key(7), DATA[0][0])
    assert state.stages[2].inbox["label"].values == (None, None)
    ends = []
    for start in (state, pipe.init(jax.random.key(7), *DATA[0])):
        for batch in DATA:
            start, _ = pipe.step(start, batch)
        ends.append(start)
    assert form(ends[0]) == form(ends[1])


def test_nothing_compiles_after_the_first_full_tick():
    pipe = pipeline(fdg.schedule.fdg(3))
    state = pipe.init(jax.random.key(7), *DATA[0])
    compiled = []

    def listen(event, duration, **rest):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for step in range(1000):
        state, _ = pipe.step(state, DATA[step % 10])
        if step == 8:
            before = len(compiled)
    assert before > 0
    assert len(compiled) == before


def test_a_consumed_state_is_named():
    pipe = pipeline(fdg.schedule.fdg(2))
    state = pipe.init(jax.random.key(7), *DATA[0])
    for batch in DATA[:5]:
        old = state
        state, _ = pipe.step(state, batch)
    for use in (
        lambda: pipe.step(old, DATA[0]),
        lambda: pipe.drain(old),
    ):
        with pytest.raises(fdg.ConsumedStateError, match="was consumed by an earlier step"):
            use()
    pipe.step(state, DATA[0])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda k: optax.sgd, "sgd is a function, no optax transformation; give one, such as"),
        ("adam", "is neither an optax transformation nor a function of the stage"),
        (lambda k: None, "is no optax transformation"),
    ],
)
def test_what_is_no_optimizer_is_refused_at_once(optimizer, message):
    with pytest.raises(ValueError, match=message):
        fdg.Pipeline(
            [networks.dense(networks.CLASSES)],
            networks.loss_fn,
            optimizer,
            fdg.schedule.fdg(1),
        )


def test_one_transformation_serves_all_stages():
    stages = [networks.dense(networks.WIDTH), networks.dense(networks.CLASSES, lambda x: x)]
    pipes = [
        fdg.Pipeline(stages, networks.loss_fn, optimizer, fdg.schedule.fdg(2))
        for optimizer in (optax.adam(0.1), lambda k: optax.adam(0.1))
    ]
    ends = [pipe.params(networks.run(pipe, DATA)[0]) for pipe in pipes]
    assert networks.difference(*ends) == 0


def failing_update(g, state, params=None):
    raise RuntimeError("no such update")


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (failing_update, r"that of stage 0 \(layer 0\) fails in its update: RuntimeError"),
        (lambda g, s, p=None: (g, (s, s)), r"changes the state: .*"),
        (
            lambda g, s, p=None: (jax.tree.map(lambda v: v[None], g), s),
            r"changes the params: .*float64",
        ),
    ],
)
def test_an_optimizer_that_fails_is_found_before_any_step(update, message):
    optimizer = optax.GradientTransformation(lambda params: jnp.zeros(()), update)
    pipe = fdg.Pipeline(
        [networks.dense(networks.CLASSES)], networks.loss_fn, optimizer, fdg.schedule.fdg(1)
    )
    state = pipe.init(jax.random.key(0), DATA[0][0])
    with pytest.raises(ValueError, match=message):
        pipe.step(state, DATA[0])
    assert int(state.tick) == 0


def test_metrics_of_every_batch_of_a_tick_are_returned():
    # Two mini-batches reach the loss in one tick, none in the next.
    def rule(t):
        if t % 2 == 0:
            return [fdg.schedule.Action("F", t, 0)]
        batches = (t - 1, t)
        forward = [fdg.schedule.Action("F", t, 0)]
        up = [fdg.schedule.Action("F", n, 1) for n in batches]
        back = [fdg.schedule.Action("B", n, k) for n in batches for k in (1, 0)]
        return [*forward, *up, *back, *(fdg.schedule.Action("U", t, k) for k in (1, 0))]

    schedule = fdg.schedule.Schedule("pairs", 2, rule, period=2)
    stages = [networks.dense(networks.WIDTH), networks.dense(networks.CLASSES, lambda x: x)]
    pipe, _ = networks.assert_equals_oracle(stages, networks.sgd(1, 2), schedule, DATA)
    state = pipe.init(jax.random.key(0), *DATA[0])
    seen = []
    for batch in DATA[:4]:
        state, metrics = pipe.step(state, batch)
        seen.append([m.batch for m in metrics])
    assert seen == [[], [0, 1], [], [2, 3]]


def test_a_mask_that_is_passed_on_is_no_failure():
    mask = fdg.Layer(
        lambda key, x: ((), ()),
        lambda p, s, x, *, train, key: ((x, jnp.where(x > 0, 0.0, -jnp.inf)), s),
    )
    keep = fdg.Layer(
        lambda key, x: ({"scale": jnp.ones(4), "never": jnp.full(4, -jnp.inf)}, ()),
        lambda p, s, x, *, train, key: ((x[0] * p["scale"], x[1]), s),
    )
    head = networks.dense(networks.CLASSES, lambda x: x)
    last = fdg.Layer(
        lambda key, x: head.init(key, x[0]),
        lambda p, s, x, *, train, key: head.apply(p, s, x[0], train=train, key=key),
    )

    def loss_fn(outputs, labels):
        loss, metrics = networks.loss_fn(outputs, labels)
        return loss, {**metrics, "infinite": jnp.float32(jnp.inf)}

    first = fdg.chain([networks.dense(4), mask])
    for schedule in (fdg.schedule.fdg(3), fdg.schedule.adl(3, 2)):
        pipe = fdg.Pipeline(
            [first, keep, last], loss_fn, optax.sgd(0.05), schedule, on_nonfinite="skip"
        )
        state, metrics = networks.run(pipe, DATA)
        # The mask is made in stage 0, which is told; stage 1 only passes it on.
        assert pipe.skipped(state)[1:] == [0, 0]
        assert len(metrics) == len(DATA)


def test_a_schedule_that_holds_more_than_its_period_says_is_named():
    # Every 40th tick forwards nothing, and the tick after it two batches; that is not declared.
    def rule(t):
        batches = [] if t % 40 == 39 else [t - 1, t] if t % 40 == 0 else [t]
        return [fdg.schedule.Action(kind, n, 0) for n in batches for kind in "FBU"]

    schedule = fdg.schedule.Schedule("hidden", 1, rule)
    pipe = fdg.Pipeline(
        [networks.dense(networks.CLASSES)], networks.loss_fn, optax.sgd(0.1), schedule
    )
    state = pipe.init(jax.random.key(0), *DATA[0])
    for step in range(39):
        state, _ = pipe.step(state, DATA[step % 10])
    with pytest.raises(ValueError, match=r"holds \[39\] between two ticks, .*give the Schedule"):
        pipe.step(state, DATA[0])
