"""DNI: cotangents predicted by synthesizers, taught early or late."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import reference
from fdg_jax.partition.cuts import units_of
from tests import networks
from tests.thinned import thinned

DATA = networks.batches(14)


def partitioned(num_stages: int, **options):
    layers = networks.network(**options)
    return fdg.partition(layers, num_stages, DATA[0][0], cost=[1] * len(units_of(layers)))


SCHEDULES = {
    "dni": fdg.schedule.dni,
    "late": fdg.schedule.dni_late,
    "phases": lambda k: fdg.schedule.dni_late(k, predicted=2, true=1),
    "mostly true": lambda k: fdg.schedule.dni_late(k, predicted=1, true=3),
}


def compare(
    schedule,
    stages,
    data=DATA,
    gradient="stale",
    synthesizers=networks.SYNTHESIZER,
    message_dtype=None,
):
    k = schedule.num_stages
    pipe = fdg.Pipeline(
        stages,
        networks.loss_fn,
        networks.sgd(1, k),
        schedule,
        gradient=gradient,
        synthesizers=synthesizers,
        message_dtype=message_dtype,
    )
    key = jax.random.key(7)
    state = pipe.init(key, *data[0])
    params, model_state, own = jax.device_get(
        [
            [getattr(s, name) for s in state.stages]
            for name in ("params", "model_state", "synthesizer")
        ]
    )
    metrics = []
    for batch in data:
        state, m = pipe.step(state, batch)
        metrics += m
    state, m = pipe.drain(state)
    expected = reference.train(
        stages,
        networks.loss_fn,
        networks.sgd(1, k),
        schedule,
        params,
        model_state,
        key,
        data,
        gradient,
        synthesizers=[(synthesizers, one) for one in own[:-1]],
        message_dtype=message_dtype,
    )
    assert networks.difference([m.loss for m in [*metrics, *m]], expected.losses) <= 1e-12
    assert networks.difference(pipe.params(state), expected.params) <= 1e-12
    assert networks.difference([s.model_state for s in state.stages], expected.model_state) <= 1e-12
    return pipe, state


@pytest.mark.parametrize(("name", "num_stages"), thinned(SCHEDULES, [2, 3, 4]))
def test_equals_the_oracle(name, num_stages):
    compare(SCHEDULES[name](num_stages), partitioned(num_stages))


@pytest.mark.parametrize(
    "gradient", thinned(["recompute_stale", "recompute", "reconstruct"], keep=3)
)
def test_with_other_rules(gradient):
    compare(SCHEDULES["phases"](3), partitioned(3), gradient=gradient)


@pytest.mark.parametrize("name", thinned(["dni", "phases"], keep=2))
def test_a_synthesizer_gets_what_is_sent(name):
    _, state = compare(SCHEDULES[name](3), partitioned(3), message_dtype="int8")
    assert state.stages[1].inbox["output"].values[0].output.values.dtype == jnp.int8


def test_synthesizers_learn():
    # A network that stands still: the late teacher is a regression on what back-propagation gives.
    pipe = fdg.Pipeline(
        partitioned(2, dropping=False),
        networks.loss_fn,
        optax.sgd(0.0),
        fdg.schedule.dni_late(2),
        synthesizers=fdg.Synthesizer(networks.conditional(), optax.adam(0.02)),
    )
    state = pipe.init(jax.random.key(0), *DATA[0])
    errors = []
    for step in range(400):
        state, _ = pipe.step(state, DATA[step % len(DATA)])
        if step in (20, 399):
            inbox = state.stages[0].inbox
            errors.append(_error(pipe, state, inbox))
    assert errors[1] < 0.5 * errors[0]


def _error(pipe, state, inbox) -> float:
    """Squared error of the prediction for the batch whose cotangent is there, against zero's."""
    own = dict(inbox["output"].items())
    ((n, cotangent),) = inbox["cotangent"].items()
    synthesizer = pipe.stages[0].synthesizer
    params, model_state, _ = state.stages[0].synthesizer
    (made,), _ = synthesizer.predict(params, model_state, own[n], jax.random.key(0))
    return float(jnp.sum((made - cotangent[0]) ** 2) / jnp.sum(cotangent[0] ** 2))


@pytest.mark.parametrize("make", [fdg.schedule.dni, fdg.schedule.dni_late])
def test_an_exact_synthesizer_gives_back_propagation(make):
    # The last stage has no weights, so that the cotangent is a function of output and labels.
    body = fdg.chain([networks.dense(6), networks.batch_norm(), networks.dense(3, lambda x: x)])
    top = fdg.from_fn(lambda x: 2 * x)

    def exact(pair):
        y, labels = pair
        return jax.grad(lambda v: networks.loss_fn(2 * v, labels)[0])(y)

    synthesizer = fdg.Synthesizer(fdg.from_fn(exact), optax.sgd(0.1))
    ends = []
    for schedule, own in ((make(2), synthesizer), (fdg.schedule.backprop(2), None)):
        pipe = fdg.Pipeline(
            [body, top], networks.loss_fn, networks.sgd(1, 2), schedule, synthesizers=own
        )
        state = pipe.init(jax.random.key(7), *DATA[0])
        for batch in DATA:
            state, _ = pipe.step(state, batch)
        ends.append(pipe.params(pipe.drain(state)[0]))
    assert networks.difference(*ends) <= 1e-12


def test_messages_and_what_is_held():
    late = fdg.schedule.dni_late(3, predicted=1, true=1)
    assert [late.delay(k) for k in range(3)] == [4, 2, 0]
    assert [late.mean_staleness(k) for k in range(3)] == [2.0, 1.0, 0.0]
    early = fdg.schedule.dni(4)
    assert [(early.delay(k), early.staleness(k)) for k in range(4)] == [(0, 0)] * 4
    assert early.predicts == early.labelled[:-1] == (0, 1, 2)
    assert fdg.schedule.dni(1).predicts == ()
    with pytest.raises(ValueError, match="predicted=0: must be 1 or more"):
        fdg.schedule.dni_late(2, predicted=0)
    with pytest.raises(ValueError, match=r"predicts=.*must name stages without a loss"):
        fdg.schedule.Schedule("x", 2, lambda t: [], predicts=(1,))


def make(**options):
    return fdg.Pipeline(
        partitioned(2),
        networks.loss_fn,
        optax.sgd(0.1),
        options.pop("schedule", fdg.schedule.dni(2)),
        **options,
    )


def test_wrong_synthesizers_are_refused():
    with pytest.raises(ValueError, match="synthesizers=None: schedule dni predicts in stages"):
        make()
    with pytest.raises(ValueError, match="schedule fdg has none"):
        make(schedule=fdg.schedule.fdg(2), synthesizers=networks.SYNTHESIZER)
    with pytest.raises(ValueError, match="is no Synthesizer"):
        make(synthesizers=lambda k: networks.conditional())
    with pytest.raises(ValueError, match="a prediction comes without the output"):
        make(synthesizers=networks.SYNTHESIZER, gradient="reversible")
    wide = fdg.Synthesizer(fdg.from_fn(lambda pair: jnp.tile(pair[0], 2)), optax.sgd(0.1))
    with pytest.raises(ValueError, match="must keep structure, shapes and dtypes"):
        make(synthesizers=wide).init(jax.random.key(0), *DATA[0])


def test_each_stage_may_have_its_own():
    seen = []

    def own(k):
        seen.append(k)
        return networks.SYNTHESIZER

    fdg.Pipeline(
        partitioned(4),
        networks.loss_fn,
        optax.sgd(0.1),
        fdg.schedule.dni(4),
        synthesizers=own,
    )
    assert seen == [0, 1, 2]


def test_a_restored_run_goes_on_to_the_bit(tmp_path):
    from fdg_jax.checkpoint import Checkpointer

    def pipeline():
        return fdg.Pipeline(
            partitioned(3),
            networks.loss_fn,
            networks.sgd(1, 3),
            fdg.schedule.dni_late(3, predicted=2, true=1),
            synthesizers=networks.SYNTHESIZER,
        )

    pipe = pipeline()
    state = pipe.init(jax.random.key(7), *DATA[0])
    for batch in DATA[:7]:
        state, _ = pipe.step(state, batch)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, 7)
        for batch in DATA[7:]:
            state, _ = pipe.step(state, batch)
    fresh = pipeline()
    again, _ = Checkpointer(tmp_path, fresh).restore(DATA[0])
    for batch in DATA[7:]:
        again, _ = fresh.step(again, batch)
    for a, b in zip(
        jax.tree.leaves(state.stages[0]), jax.tree.leaves(again.stages[0]), strict=True
    ):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
