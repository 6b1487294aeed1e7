"""Axis 0 is the batch's only where it is: class weights, masks [T, T], edges of graphs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.analysis import Recorder
from fdg_jax.checkpoint import Checkpointer
from tests import networks

T, D, C = 6, 4, 3
RNG = np.random.default_rng(2)


def attention():
    def init(key, inputs):
        return {"q": jax.random.normal(key, (D, D)) / 2}, ()

    def apply(params, state, inputs, *, train, key):
        x, mask = inputs
        scores = jnp.einsum("btd,bsd->bts", x @ params["q"], x) + mask
        return (x + jax.nn.softmax(scores) @ x, mask), state

    return fdg.Layer(init, apply)


def graph():
    """Messages along edges [2, E] that all rows of the batch share."""

    def init(key, inputs):
        return {"w": jax.random.normal(key, (D, D)) / 2}, ()

    def apply(params, state, inputs, *, train, key):
        nodes, edges = inputs
        sent = (nodes @ params["w"])[:, edges[0]]
        return (nodes + jnp.zeros_like(nodes).at[:, edges[1]].add(sent), edges), state

    return fdg.Layer(init, apply)


def first_of(pair):
    return pair[0]


MASK = np.where(np.tril(np.ones((T, T))), 0.0, -1e9)
EDGES = RNG.integers(0, T, (2, 9))
WEIGHTS = np.array([0.1, 0.5, 2.0])


def mse(y, t):
    return jnp.mean((y - t) ** 2), {}


def class_weighted(y, labels):
    labels, weights = labels
    loss = optax.softmax_cross_entropy_with_integer_labels(y, labels)
    return jnp.mean(loss * weights[labels]), {}


def batches(kind, mark=fdg.shared):
    found = []
    for _ in range(4):
        x = RNG.normal(size=(8, T, D))
        if kind == "class weights":
            found.append((x[:, 0], (RNG.integers(0, C, 8), mark(WEIGHTS))))
        else:
            found.append(((x, mark(MASK if kind == "mask" else EDGES)), x[::-1]))
    return found


def pipeline(kind, schedule, **options):
    if kind == "class weights":
        layers, loss = [networks.dense(5), networks.dense(C)], class_weighted
    else:
        make = attention if kind == "mask" else graph
        layers, loss = [make(), fdg.chain([make(), fdg.from_fn(first_of)])], mse
    return fdg.Pipeline(layers, loss, lambda k: optax.sgd(0.1, momentum=0.9), schedule, **options)


KINDS = ["class weights", "mask", "edges"]
SCHEDULES = [
    fdg.schedule.gpipe(2, 2),
    fdg.schedule.one_f_one_b(2, 4),
    fdg.schedule.zero_bubble(2, 2),
]
each = pytest.mark.parametrize("kind", KINDS)


@each
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize("devices", [2, 4])
def test_what_is_marked_is_not_divided(kind, schedule, devices):
    marked = batches(kind)
    plain = jax.tree.map(
        lambda v: getattr(v, "value", v), marked, is_leaf=lambda v: hasattr(v, "value")
    )
    divided = pipeline(kind, schedule, devices=jax.devices()[:devices])
    state, metrics = networks.run(divided, marked)
    whole = pipeline(kind, fdg.schedule.backprop(2))
    expected, losses = networks.run(whole, plain)
    assert networks.difference(divided.params(state), whole.params(expected)) < 1e-12
    assert networks.difference([m.loss for m in metrics], [m.loss for m in losses]) < 1e-12


@each
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_what_is_not_marked_is_refused_and_nothing_is_lost(kind, schedule):
    good, bad = batches(kind), batches(kind, mark=lambda v: v)
    pipe = pipeline(kind, schedule)
    state = pipe.init(jax.random.key(0), *good[0])
    state, _ = pipe.step(state, good[0])
    with pytest.raises(ValueError, match=r"these differ: inputs.*; mark .* fdg_jax.shared\(array"):
        pipe.step(state, bad[0])
    state, _ = pipe.step(state, good[1])
    pipe.check()
    assert state.tick == 2


@each
@pytest.mark.parametrize("mark", [fdg.shared, lambda v: v], ids=["marked", "not marked"])
@pytest.mark.parametrize("schedule", [fdg.schedule.fdg(2), fdg.schedule.ddg(2)])
def test_devices_only_share_out_the_work(kind, mark, schedule):
    """Whether they divide an axis or not."""
    data, found = batches(kind, mark), []
    for devices in (1, 2, 4):
        pipe = pipeline(kind, schedule, devices=jax.devices()[:devices])
        state, _ = networks.run(pipe, data)
        y = pipe.predict(state, data[0][0])
        found.append(jax.device_get((pipe.params(state), y)))
    assert networks.difference(found[0], found[1]) < 1e-12
    assert networks.difference(found[0], found[2]) < 1e-12


@pytest.mark.parametrize("schedule", [fdg.schedule.fdg(2), fdg.schedule.gpipe(2, 2)])
@pytest.mark.parametrize("kind", ["class weights", "mask"])
def test_the_oracle_knows_marks(kind, schedule):
    pipe = pipeline(kind, schedule)
    layers = [stage.layer for stage in pipe.stages]
    loss = class_weighted if kind == "class weights" else mse
    networks.assert_equals_oracle(layers, networks.sgd(1, 2), schedule, batches(kind), loss=loss)


def test_marks_stand_in_examples_too(tmp_path):
    data = batches("mask")
    x, _ = data[0]
    layers = [attention(), attention(), fdg.from_fn(first_of)]
    stages = fdg.partition(layers, 2, x)
    schedule = fdg.schedule.gpipe(2, 2)
    pipe = fdg.Pipeline(stages, mse, lambda k: optax.sgd(0.1), schedule)
    state = pipe.init(jax.random.key(0), *data[0])
    shapes = pipe.template(data[0])
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    recorder = Recorder(pipe, batches=2)
    with Checkpointer(tmp_path, pipe) as checkpointer:
        state, _ = pipe.step(state, data[0])
        checkpointer.save(state, step=1)
        state, _ = pipe.step(state, data[1])
    assert recorder.timeline().events
    with Checkpointer(tmp_path, pipe) as checkpointer:
        again, _ = checkpointer.restore(data[0])
    again, _ = pipe.step(again, data[1])
    assert networks.difference(pipe.params(state), pipe.params(again)) == 0


def test_scalars_and_nothing_need_no_mark():
    x = np.ones((8, 3))

    def loss(y, t):
        return jnp.mean(y) * t["scale"], {}

    pipe = fdg.Pipeline(
        [networks.dense(2)] * 2, loss, lambda k: optax.sgd(0.1), fdg.schedule.gpipe(2, 2)
    )
    state = pipe.init(jax.random.key(0), x)
    state, metrics = pipe.step(state, (x, {"scale": np.float64(2), "none": None}))
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("size", "schedule", "devices", "message"),
    [
        (9, fdg.schedule.gpipe(2, 2), 2, "inputs: a batch of 9 does not divide into 2 micro"),
        (6, fdg.schedule.gpipe(2, 2), 4, "inputs: a batch of 3 does not divide over the 2 devices"),
        (7, fdg.schedule.fdg(2), 4, "inputs: a batch of 7 does not divide over the 2 devices"),
    ],
)
def test_what_does_not_divide_is_refused(size, schedule, devices, message):
    x, t = np.ones((size, 3)), np.ones((size, 2))
    pipe = fdg.Pipeline(
        [networks.dense(2)] * 2,
        mse,
        lambda k: optax.sgd(0.1),
        schedule,
        devices=jax.devices()[:devices],
    )
    state = pipe.init(jax.random.key(0), np.ones((8, 3)))
    with pytest.raises(ValueError, match=message):
        pipe.step(state, (x, t))
    if devices == 4 and size == 7:
        with pytest.raises(ValueError, match=message):
            pipe.predict(state, x)
