"""Tied weights in the state, in checkpoints, and where they cannot be."""

import warnings

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import fdg_jax as fdg
from fdg_jax.checkpoint import Checkpointer, convert, weights
from tests import networks
from tests.test_tie import DATA, KEY, TOKENS, embedding, head, layers, pipeline, stages, tied


@pytest.mark.parametrize("num_stages", [2, 3])
def test_state_keeps_its_structure(num_stages):
    pipe = pipeline(num_stages)
    state = pipe.init(KEY, *DATA[0])
    shapes = jax.eval_shape(pipe.init, KEY, *DATA[0])

    def signature(state):
        leaves, structure = jax.tree.flatten(state)
        return [(leaf.shape, leaf.dtype) for leaf in leaves], structure

    structure = signature(state)[1]
    assert signature(shapes)[0] == signature(state)[0]
    for batch in DATA:
        state, _ = pipe.step(state, batch)
        assert signature(state)[0] == signature(shapes)[0]
        assert jax.tree.structure(state) == structure
    state, _ = pipe.drain(state)
    assert signature(state)[0] == signature(shapes)[0]


@pytest.mark.parametrize("num_stages", [1, 3])
def test_checkpoints_restore_to_the_bit(num_stages, tmp_path):
    pipe = pipeline(num_stages)
    state = pipe.init(KEY, *DATA[0])
    for batch in DATA[:7]:
        state, _ = pipe.step(state, batch)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, 7)
    other = pipeline(num_stages)
    with Checkpointer(tmp_path, other) as checkpoints:
        restored, _ = checkpoints.restore(DATA[0])
    ends = []
    for one, begin in ((pipe, state), (other, restored)):
        for batch in DATA[7:]:
            begin, _ = one.step(begin, batch)
        begin, _ = one.drain(begin)
        ends.append(jax.device_get([own.params for own in begin.stages]))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    words = "params" if num_stages == 1 else "schedule"
    untied = fdg.Pipeline(
        stages(num_stages),
        networks.loss_fn,
        networks.sgd(0.9, num_stages),
        fdg.schedule.fdg(num_stages),
    )
    with Checkpointer(tmp_path, untied) as checkpoints, pytest.raises(ValueError, match=words):
        checkpoints.restore(DATA[0])


def test_stages_may_share_a_device():
    one, three = (pipeline(3, devices=jax.devices()[:n]) for n in (1, 3))
    ends = [jax.device_get(pipe.params(networks.run(pipe, DATA, KEY)[0])) for pipe in (one, three)]
    assert networks.difference(*ends) == 0


def test_predicts_with_the_owners_array():
    pipe = pipeline(3)
    state, _ = networks.run(pipe, DATA, KEY)
    params = [own for stage in jax.device_get(pipe.params(state)) for own in stage]
    params[5] = {**params[5], "kernel": params[0]["table"]}
    model_state = tuple(own for stage in state.stages for own in jax.device_get(stage.model_state))
    expected, _ = fdg.chain(layers()).apply(
        tuple(params), model_state, DATA[0][0], train=False, key=None
    )
    np.testing.assert_allclose(pipe.predict(state, DATA[0][0]), expected, rtol=0, atol=1e-12)


def test_another_k_has_the_same_array():
    source, target = pipeline(3), pipeline(2)
    state = source.init(KEY, *DATA[0])
    for batch in DATA[:6]:
        state, _ = source.step(state, batch)
    state, _ = source.drain(state)
    before = jax.device_get(source.params(state))
    moved = convert(source, state, target, *DATA[0])
    after = jax.device_get(target.params(moved))
    jax.tree.map(
        np.testing.assert_array_equal,
        [own for stage in before for own in stage],
        [own for stage in after for own in stage],
    )
    moved, _ = target.step(moved, DATA[6])
    target.drain(moved)


@pytest.mark.parametrize("on_nonfinite", ["skip", "stop"])
def test_guarded_training_is_the_same(on_nonfinite):
    ends = [
        jax.device_get(pipe.params(networks.run(pipe, DATA, KEY)[0]))
        for pipe in (pipeline(3), pipeline(3, on_nonfinite=on_nonfinite))
    ]
    assert networks.difference(*ends) == 0


@pytest.mark.parametrize(
    ("tie", "words"),
    [
        (lambda: fdg.tie(5, 0), "owner"),
        (lambda: fdg.tie(0, 9, "table"), "layers 0 to 5"),
        (lambda: fdg.tie(0, 5, "none", "kernel"), "'table'"),
        (lambda: fdg.tie(0, 5, "table"), "'bias', 'kernel'"),
        (lambda: fdg.tie(0, 5, "table", "bias"), "both must have one array"),
        (lambda: fdg.tie(0, 5, "table", "kernel", transpose=True), "transpose=True"),
    ],
)
@pytest.mark.parametrize("num_stages", [1, 3])
def test_what_cannot_be_tied_is_refused(tie, words, num_stages):
    cut, plan = stages(num_stages), fdg.schedule.fdg(num_stages)

    def init():
        pipe = fdg.Pipeline(cut, networks.loss_fn, optax.sgd(0.1), plan, tie=tie())
        pipe.init(KEY, *DATA[0])

    with pytest.raises(ValueError, match=words):
        init()


def test_rules_and_schedules_that_cannot_tie_are_refused():
    with pytest.raises(ValueError, match="reversible"):
        pipeline(2, gradient="reversible")
    losses = [networks.loss_fn] * 2
    with pytest.raises(ValueError, match="sends no gradient"):
        fdg.Pipeline(stages(2), losses, optax.sgd(0.1), fdg.schedule.local(2), tie=tied())
    repeated = [embedding(), fdg.repeat(networks.dense(networks.WIDTH), 3), head(transposed=False)]
    with pytest.raises(ValueError, match="one of a repeat"):
        fdg.Pipeline(
            repeated, networks.loss_fn, optax.sgd(0.1), fdg.schedule.fdg(3), tie=fdg.tie(0, 2)
        )


def test_checkpoints_give_the_whole_networks_weights(tmp_path):
    pipe = pipeline(3, transposed=True)
    state = pipe.init(KEY, *DATA[0])
    for batch in DATA[:7]:
        state, _ = pipe.step(state, batch)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, 7)
    cut = stages(3, transposed=True)
    found = weights.read(tmp_path / "step-000000007", cut, DATA[0][0], tie=pipe.tie)
    kernel = found.params[2][1]["kernel"]
    np.testing.assert_array_equal(kernel, found.params[0][0]["table"].T)
    outputs, _ = fdg.chain(cut).apply(
        tuple(found.params), tuple(found.model_state), DATA[0][0], train=False, key=None
    )
    np.testing.assert_allclose(pipe.predict(state, DATA[0][0]), outputs, rtol=0, atol=1e-12)


class Reads(nnx.Module):
    """A head that uses an embedding's table."""

    def __init__(self, embed):
        self.embed = embed

    def __call__(self, x):
        return self.embed.attend(x)


def modules(first, last):
    return [
        fdg.from_nnx(lambda rngs: first(rngs)),
        networks.dense(6),
        fdg.from_nnx(lambda rngs: Reads(last(rngs))),
    ]


@pytest.mark.parametrize("num_stages", [1, 3])
def test_one_module_in_two_layers_is_noticed(num_stages):
    module = nnx.Embed(TOKENS, 6, rngs=nnx.Rngs(0))
    x = DATA[0][0][:, 0]

    def init(network, **options):
        cut = fdg.partition(network, num_stages, x, cost=[1] * len(network))
        plan = fdg.schedule.fdg(num_stages)
        pipe = fdg.Pipeline(cut, networks.loss_fn, optax.sgd(0.1), plan, **options)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            pipe.init(KEY, x, DATA[0][1])
        return [str(one.message) for one in found]

    (said,) = init(modules(lambda rngs: module, lambda rngs: module))
    assert "layers 0 and 2" in said
    assert "fdg.tie(0, 2" in said
    assert not init(modules(lambda rngs: module, lambda rngs: module), tie=fdg.tie(0, 2))

    def new(rngs):
        return nnx.Embed(TOKENS, 6, rngs=rngs)

    assert not init(modules(new, new))
    block = fdg.from_nnx(lambda rngs: nnx.Linear(6, 6, rngs=rngs))
    assert not init([fdg.from_nnx(new), block, block, head(transposed=True)])
