"""What an optimizer asks for, and what it changes, is found with the first batch and named."""

import jax
import jax.numpy as jnp
import optax
import pytest

import fdg_jax as fdg
from tests import networks

DATA = networks.batches(2)


def layers(count: int) -> list[fdg.Layer]:
    last = networks.dense(networks.CLASSES, lambda x: x)
    return [*(networks.dense(networks.WIDTH) for _ in range(count - 1)), last]


def refused(optimizer, schedule=None, data=DATA, **options) -> str:
    """The message with which the first step refuses; the state is whole then."""
    schedule = schedule or fdg.schedule.fdg(2)
    stages = options.pop("stages", None) or layers(schedule.num_stages)
    pipe = fdg.Pipeline(stages, networks.loss_fn, optimizer, schedule, **options)
    state = pipe.init(jax.random.key(0), *data[0])
    with pytest.raises(ValueError, match=r"that of stage|does not fit stage") as caught:
        pipe.step(state, data[0])
    jax.block_until_ready(state.stages[0].params)
    assert int(state.tick) == 0
    return str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "missing"),
    [
        (optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()), "value"),
        (optax.polyak_sgd(), "value"),
        (optax.contrib.momo(), "value"),
        (optax.lbfgs(), "value"),
        (optax.masked(optax.polyak_sgd(), True), "value"),
        (optax.MultiSteps(optax.polyak_sgd(), 2).gradient_transformation(), "value"),
        (fdg.StageOptimizer(optax.sgd(0.1), per_gradient=optax.polyak_sgd()), "value"),
    ],
)
def test_what_a_stage_does_not_have_is_named(optimizer, missing):
    message = refused(optimizer)
    assert message.startswith("optimizer: that of stage 0 (layer 0) asks for ")
    assert missing in message.partition("which a stage does not have")[0]


def test_the_stage_is_named():
    optimizers = [optax.sgd(0.1), optax.polyak_sgd()]
    message = refused(lambda k: optimizers[k])
    assert message.startswith("optimizer: that of stage 1 (layer 1) asks for value, ")


def test_sums_of_gradients_have_no_staleness():
    def update(updates, state, params=None, *, staleness, **extra):
        return updates, state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    message = refused(optimizer, fdg.schedule.adl(2, accumulate=2))
    assert "asks for staleness" in message
    assert "only per_gradient of a StageOptimizer gets them" in message
    both = fdg.StageOptimizer(optax.sgd(0.1), per_gradient=optimizer)
    pipe = fdg.Pipeline(layers(2), networks.loss_fn, both, fdg.schedule.adl(2, accumulate=2))
    networks.run(pipe, networks.batches(4))


def changing(of_state):
    """An optimizer whose state begins as a dictionary of one number."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -0.1 * g, updates), of_state(state)

    return optax.GradientTransformation(lambda params: {"n": jnp.zeros((), jnp.int32)}, update)


@pytest.mark.parametrize(
    ("of_state", "found"),
    [
        (lambda s: {"n": s["n"] + 0.5}, "n from int32[] to float"),
        (lambda s: {"n": s["n"][None]}, "n from int32[] to int32[1]"),
        (lambda s: {**s, "m": s["n"]}, "m from missing to int32[]"),
        (lambda s: {}, "n from int32[] to missing"),
        (lambda s: {"n": jax.random.key(0)}, "n from int32[] to key<fry>[]"),
    ],
)
def test_what_an_optimizer_changes_is_named(of_state, found):
    message = refused(lambda k: changing(of_state if k else lambda s: s))
    assert "that of stage 1 (layer 1) changes the state: " in message
    assert found in message


@pytest.mark.parametrize(
    ("of_state", "found"),
    [
        (lambda s: {"n": s["n"] + 0.5}, "n from int32[] to float"),
        (lambda s: {"n": jnp.stack([s["n"]] * 2)}, "n from int32[] to int32[2]"),
        (lambda s: {**s, "k": jax.random.key(0)}, "k from missing to key<fry>[]"),
    ],
)
def test_what_a_model_state_changes_is_named(of_state, found):
    def init(key, x):
        return {"w": jnp.ones(())}, {"n": jnp.zeros((), jnp.int32)}

    def apply(params, state, x, *, train, key):
        return x * params["w"], of_state(state) if train else state

    stages = [networks.dense(networks.WIDTH), fdg.chain([fdg.Layer(init, apply), *layers(1)])]
    message = refused(optax.sgd(0.1), stages=stages)
    assert "batch 0: does not fit stage 1 (layers 1 to 2): its model state changes" in message
    assert found in message
    guarded = fdg.Pipeline(
        stages, networks.loss_fn, optax.sgd(0.1), fdg.schedule.fdg(2), on_nonfinite="skip"
    )
    with pytest.raises(ValueError, match=r"stage 1 \(layers 1 to 2\): its model state") as caught:
        guarded.init(jax.random.key(0), *DATA[0])
    assert found in str(caught.value)


def test_synthesizers_are_tried_as_well():
    schedule = fdg.schedule.dni(2)
    odd = fdg.Synthesizer(fdg.from_fn(lambda pair: pair[0] / 2), optax.polyak_sgd())
    message = refused(optax.sgd(0.1), schedule, synthesizers=odd)
    assert "synthesizers: that of stage 0 (layer 0) asks for value" in message


def test_a_state_that_was_restored_is_tried_with_the_new_optimizer():
    pipes = [
        fdg.Pipeline(layers(2), networks.loss_fn, one, fdg.schedule.fdg(2))
        for one in (changing(lambda s: s), changing(lambda s: {"n": s["n"] * 1.0}))
    ]
    state = pipes[0].init(jax.random.key(0), *DATA[0])
    state, _ = pipes[0].step(state, DATA[0])
    with pytest.raises(ValueError, match=r"changes the state: n from int32\[\] to float"):
        pipes[1].step(state, DATA[1])
    state, _ = pipes[0].step(state, DATA[1])
    assert int(state.tick) == 2


@pytest.mark.parametrize("other", ["optimizer", "network"])
def test_a_state_of_another_pipeline_is_named(other):
    plan = fdg.schedule.fdg(2)
    pipe = fdg.Pipeline(layers(2), networks.loss_fn, optax.adam(0.1), plan)
    if other == "optimizer":
        source = fdg.Pipeline(layers(2), networks.loss_fn, optax.sgd(0.1), plan)
    else:
        source = fdg.Pipeline(
            [layers(2)[0], *[fdg.chain(layers(2))]], networks.loss_fn, optax.adam(0.1), plan
        )
    state = source.init(jax.random.key(0), *DATA[0])
    with pytest.raises(
        ValueError, match=r"state: that of stage \d .* give a state of this pipeline"
    ):
        pipe.step(state, DATA[0])
