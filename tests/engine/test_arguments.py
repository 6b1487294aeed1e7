"""Arguments of another kind: one line with the argument, its value, and what to give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import fdg_jax as fdg
from tests import networks

X = np.ones((8, 4))


def mse(y, t):
    return jnp.mean((y - t) ** 2), {}


def make(num_stages=2, **change):
    stages = [networks.dense(4) for _ in range(num_stages)]
    arguments = {
        "stages": stages,
        "loss_fn": mse,
        "optimizer": optax.adam(0.1),
        "schedule": fdg.schedule.fdg(num_stages),
        **change,
    }
    return fdg.Pipeline(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optimizer": optax.sgd},
            r"optimizer: optax.sgd would be called .* give optax.sgd\(...\)",
        ),
        ({"optimizer": lambda k: 0.1}, "optimizer: 0.1 is no optax transformation; give one"),
        ({"optimizer": 0.1}, "optimizer: 0.1 is neither an optax transformation nor a function"),
        ({"loss_fn": "mse"}, "loss_fn='mse': must be a function of outputs and labels"),
        ({"loss_fn": None}, "loss_fn=None: must be a function of outputs and labels"),
        ({"loss_fn": [None, "mse"]}, r"loss_fn=\[None, 'mse'\]: must be a function"),
        ({"schedule": "fdg"}, r"schedule='fdg': is no Schedule; give one, .*schedule.fdg\(2\)"),
        ({"schedule": fdg.schedule.fdg}, r"schedule=<function fdg .*: is no Schedule"),
        ({"devices": 2}, r"devices=2: must be a list of devices, such as jax.devices\(\)\[:2\]"),
        ({"devices": "cpu"}, "devices='cpu': must be a list of devices"),
        ({"devices": ["cpu:0"]}, r"devices=\['cpu:0'\]: must be a list of devices"),
    ],
)
def test_arguments_of_another_kind(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_an_optax_transformation_is_that_of_every_stage():
    pipes = [make(optimizer=o) for o in (optax.adam(0.1), lambda k: optax.adam(0.1))]
    data = [(X, X)] * 5
    params = [pipe.params(networks.run(pipe, data)[0]) for pipe in pipes]
    assert networks.difference(*params) == 0


@pytest.mark.parametrize(
    "key", ["a", 0.5, None, np.arange(4.0), X, jax.random.split(jax.random.key(0)), np.int32(3)]
)
def test_what_is_no_key(key):
    with pytest.raises(TypeError, match=r"key.*(is no JAX key|not one JAX key); give jax.random.k"):
        make().init(key, X)


@pytest.mark.parametrize("call", ["step", "drain", "predict", "params", "true_params"])
def test_what_is_no_state(call):
    pipe = make()
    state = pipe.init(jax.random.key(0), X)
    rest = {"step": [(X, X)], "predict": [X]}.get(call, [])
    for wrong in (None, (state, []), pipe.params(state), {}):
        with pytest.raises(ValueError, match=f"state: is a {type(wrong).__name__}; give what"):
            getattr(pipe, call)(wrong, *rest)
    other = make(3).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="state: has 3 stages, this pipeline 2"):
        getattr(pipe, call)(other, *rest)


@pytest.mark.parametrize("call", ["step", "drain", "predict", "params", "true_params"])
@pytest.mark.parametrize(
    "schedule",
    [fdg.schedule.fdg(2), fdg.schedule.gpipe(2, 2), fdg.schedule.adl(2, accumulate=2)],
    ids=lambda s: s.name,
)
def test_a_state_that_is_used_twice_takes_nothing_of_the_new_one(call, schedule):
    pipe = make(schedule=schedule)
    state = pipe.init(jax.random.key(0), X)
    for _ in range(5):
        old, (state, _) = state, pipe.step(state, (X, X))
    twin = jax.tree.map(jnp.copy, state)
    rest = {"step": [(X, X)], "predict": [X]}.get(call, [])
    if call == "params":  # only where it has given them away
        jax.tree.map(lambda leaf: leaf.delete(), old.stages[1].params)
        state = twin
    with pytest.raises(fdg.ConsumedStateError, match="state: was consumed by an earlier step"):
        getattr(pipe, call)(old, *rest)
    for _ in range(3):
        state, _ = pipe.step(state, (X, X))
    pipe.check()
    assert state.tick == 8


@pytest.mark.parametrize("labels", ["a", np.array(["a"] * 8), np.array([object()] * 8)])
def test_labels_that_are_no_numbers(labels):
    pipe = make()
    state = pipe.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"labels: a (str|ndarray) .* is no array of numbers"):
        pipe.step(state, (X, labels))
    state, _ = pipe.step(state, (X, X))


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("schedule", [fdg.schedule.fdg(2), fdg.schedule.gpipe(2, 2)])
@pytest.mark.parametrize("devices", [2, 4])
def test_an_active_mesh_changes_nothing(kind, schedule, devices):
    def trained(x):
        pipe = make(schedule=schedule, devices=jax.devices()[:devices])
        state = pipe.init(jax.random.key(0), x, x)
        for _ in range(4):
            state, _ = pipe.step(state, (x, x))
        state, _ = pipe.drain(state)
        cuts = fdg.partition([networks.dense(4)] * 2, 2, x).cuts
        params, true = pipe.params(state), pipe.true_params(state)
        return cuts, jax.device_get((params, true, pipe.predict(state, x), pipe.skipped(state)))

    with jax.set_mesh(jax.make_mesh((4,), ("d",), axis_types=(kind,))):
        cuts, found = trained(X)
        again = trained(jnp.asarray(X))[1]
        spread = jax.device_put(X, jax.sharding.PartitionSpec("d"))
        sharded = trained(spread)[1]
    expected = trained(X)
    assert cuts == expected[0]
    for one in (found, again, sharded):
        assert networks.difference(one, expected[1]) == 0


def test_stages_that_share_devices_unasked_are_told_once_per_pipeline():
    with pytest.warns(
        UserWarning, match=r"6 stages share 4 devices: .*cpu:0 has stages 0, 1"
    ) as seen:
        make(6)
    assert [w.filename for w in seen] == [__file__]
