"""What the pipeline promises beside its numbers."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fdg_jax as fdg
from fdg_jax.layer import batch_key
from tests import networks


def make(num_stages=3, schedule=None, **options) -> fdg.Pipeline:
    data = networks.batches(1)
    stages = fdg.partition(networks.network(), num_stages, data[0][0], cost=[1] * 7)
    schedule = schedule or fdg.schedule.fdg(num_stages)
    return fdg.Pipeline(
        stages, networks.loss_fn, networks.sgd(0.5, num_stages), schedule, **options
    )


class Convolutional(nnx.Module):
    """Convolution, batch normalisation, dropout, dense: float32."""

    def __init__(self, *, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.dense = nnx.Linear(4, networks.CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x))))
        return self.dense(x.mean(axis=(1, 2)))


def test_one_stage_is_a_plain_jitted_optax_loop_bit_for_bit():
    network = fdg.from_nnx(lambda rngs: Convolutional(rngs=rngs))
    optimizer = networks.sgd(1, 1)(0)
    rng = np.random.default_rng(0)
    data = [
        (rng.normal(size=(8, 6, 6, 3)).astype(np.float32), rng.integers(0, 3, 8)) for _ in range(30)
    ]
    key = jax.random.key(3)

    @jax.jit
    def plain(params, state, opt_state, n, x, labels):
        def loss(params):
            folded = jax.random.fold_in(batch_key(key, n), 0)
            y, new_state = network.apply(params, state, x, train=True, key=folded)
            return networks.loss_fn(y, labels)[0], new_state

        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, value

    pipe = fdg.Pipeline([network], networks.loss_fn, lambda k: optimizer, fdg.schedule.fdg(1))
    start = pipe.init(key, data[0][0])
    params, state = jax.device_get((start.stages[0].params, start.stages[0].model_state))
    opt_state, losses = optimizer.init(params), []
    for n, (x, labels) in enumerate(data):
        params, state, opt_state, loss = plain(params, state, opt_state, n, x, labels)
        losses.append(loss)
    final, metrics = networks.run(pipe, data, key)
    np.testing.assert_array_equal([m.loss for m in metrics], losses)
    jax.tree.map(np.testing.assert_array_equal, pipe.params(final)[0], params)
    jax.tree.map(np.testing.assert_array_equal, final.stages[0].model_state, state)


def test_parameters_live_on_their_own_stage_and_stay_there():
    pipe = make(3)
    state = pipe.init(jax.random.key(0), networks.batches(1)[0][0])
    for batch in [None, *networks.batches(6)]:
        if batch is not None:
            state, _ = pipe.step(state, batch)
        for k, stage in enumerate(state.stages):
            for leaf in jax.tree.leaves((stage.params, stage.model_state, stage.opt_state)):
                assert leaf.devices() == {jax.devices()[k]}


def test_initial_weights_and_noise_do_not_depend_on_the_cuts():
    data = networks.batches(12)
    losses = []
    for num_stages in (1, 2, 4):
        # Backprop: the only difference that is left is where the network is cut.
        stages = fdg.partition(networks.network(), num_stages, data[0][0], cost=[1] * 7)
        schedule = fdg.schedule.backprop(num_stages)
        pipe = fdg.Pipeline(stages, networks.loss_fn, networks.sgd(1, num_stages), schedule)
        _, metrics = networks.run(pipe, data)
        losses.append([float(m.loss) for m in metrics])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(losses[2], losses[0], rtol=0, atol=1e-12)


def test_fewer_devices_than_stages_give_the_same_result():
    data = networks.batches(12)
    many, _ = networks.run(make(4), data)
    few, _ = networks.run(make(4, devices=jax.devices()[:2]), data)
    assert networks.difference(many.stages[0].params, few.stages[0].params) == 0
    where = [jax.tree.leaves(s.params)[0].devices() for s in few.stages]
    assert where == [{jax.devices()[k // 2]} for k in range(4)]


def test_a_group_of_devices_gives_the_result_of_one():
    data = networks.batches(30)
    one, _ = networks.run(make(2), data)
    two, _ = networks.run(make(2, devices=jax.devices()), data)
    for a, b in zip(one.stages, two.stages, strict=True):
        assert networks.difference((a.params, a.model_state), (b.params, b.model_state)) <= 1e-12
    assert jax.tree.leaves(two.stages[1].params)[0].devices() == set(jax.devices()[2:])


def test_there_are_no_metrics_while_filling_and_then_they_name_their_batch():
    pipe = make(3)
    data = networks.batches(6)
    state = pipe.init(jax.random.key(0), data[0][0])
    seen = []
    for batch in data:
        state, metrics = pipe.step(state, batch)
        seen.append([m.batch for m in metrics])
    assert seen == [[], [], [0], [1], [2], [3]]
    assert (set(metrics[0].aux), metrics[0].stage) == ({"error"}, 2)
    state, rest = pipe.drain(state)
    assert [m.batch for m in rest] == [4, 5]


def test_a_drained_pipeline_holds_nothing_and_fills_again():
    pipe = make(3)
    data = networks.batches(10)
    state, _ = networks.run(pipe, data[:5])
    for s in state.stages:
        assert not s.flights.items()
        assert not any(slots.items() for slots in s.inbox.values())
    assert [s.version for s in state.stages] == [5, 5, 5]
    again, metrics = pipe.drain(state)
    assert metrics == []
    seen = []
    for batch in data[5:]:
        again, m = pipe.step(again, batch)
        seen.append([one.batch for one in m])
    assert seen == [[], [], [5], [6], [7]]
    again, rest = pipe.drain(again)
    assert [m.batch for m in rest] == [8, 9]
    assert [s.version for s in again.stages] == [10, 10, 10]


def test_predict_is_the_chained_network_in_evaluation_mode_and_consumes_nothing():
    pipe = make(3)
    data = networks.batches(6)
    state = pipe.init(jax.random.key(0), data[0][0])
    for batch in data:
        state, _ = pipe.step(state, batch)
    stages = fdg.partition(networks.network(), 3, data[0][0], cost=[1] * 7)
    params = jax.device_get(tuple(pipe.params(state)))
    model_state = jax.device_get(tuple(s.model_state for s in state.stages))
    x = np.random.default_rng(1).normal(size=(5, 4))
    expected, _ = fdg.chain(stages).apply(params, model_state, x, train=False, key=None)
    np.testing.assert_allclose(pipe.predict(state, x), expected, rtol=0, atol=1e-12)
    pipe.step(state, data[0])  # the state is still whole


def test_arrays_of_the_user_survive():
    kernel = jnp.ones((4, networks.CLASSES))

    def init(key, x):
        return {"kernel": kernel}, ()

    layer = fdg.Layer(init, lambda p, s, x, *, train, key: (x @ p["kernel"], s))
    pipe = fdg.Pipeline(
        [layer], networks.loss_fn, lambda k: optax.sgd(0.1), fdg.schedule.backprop(1)
    )
    x, labels = networks.batches(1)[0]
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    state = pipe.init(jax.random.key(0), x)
    for _ in range(3):
        state, _ = pipe.step(state, (x, labels))
    assert float(kernel.sum()) == kernel.size
    assert bool(jnp.isfinite(x).all())
    assert not labels.is_deleted()


def test_a_numpy_batch_may_be_overwritten_after_step():
    data = networks.batches(8)
    expected, _ = networks.run(make(2), data)
    pipe = make(2)
    state = pipe.init(jax.random.key(7), data[0][0])
    x, labels = (np.empty_like(v) for v in data[0])
    for batch in data:
        x[...], labels[...] = batch
        state, _ = pipe.step(state, (x, labels))
        x[...], labels[...] = np.nan, 0
    state, _ = pipe.drain(state)
    assert networks.difference(pipe.params(state)[0], expected.stages[0].params) == 0


def test_activations_may_be_pytrees_with_integers_in_them():
    def embed(key, x):
        return jax.random.normal(key, (5, 4)), ()

    def look_up(params, state, x, *, train, key):
        return {"vectors": params[x["tokens"]], "tokens": x["tokens"]}, state

    def mix(params, state, x, *, train, key):
        weight = (x["tokens"] > 1).astype(params.dtype)[..., None]
        return {"vectors": jnp.tanh(x["vectors"] * weight @ params), "tokens": x["tokens"]}, state

    def head(params, state, x, *, train, key):
        return x["vectors"].mean(1) @ params, state

    def square(columns):
        return lambda key, x: (jax.random.normal(key, (4, columns)), ())

    stages = [
        fdg.Layer(embed, look_up),
        fdg.Layer(square(4), mix),
        fdg.Layer(square(networks.CLASSES), head),
    ]
    rng = np.random.default_rng(0)
    data = [({"tokens": rng.integers(0, 5, (8, 3))}, rng.integers(0, 3, 8)) for _ in range(30)]
    networks.assert_equals_oracle(stages, networks.sgd(0.5, 3), fdg.schedule.fdg(3), data)


def test_old_and_new_keys_are_the_same():
    x = networks.batches(1)[0][0]
    pipe = make(2)
    new, old = pipe.init(jax.random.key(5), x), pipe.init(jax.random.PRNGKey(5), x)
    assert networks.difference(pipe.params(new)[0], pipe.params(old)[0]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": fdg.schedule.fdg(2)}, "made for 2 stages, but stages has 3"),
        ({"gradient": "fresh"}, "gradient='fresh': allowed are stale"),
        ({"max_ahead": 0}, "max_ahead=0"),
        ({"devices": []}, "devices=\\[\\]"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        make(3, **change)


def test_a_batch_that_does_not_divide_over_a_group_loses_nothing():
    pipe = make(2, devices=jax.devices())
    data = networks.batches(3)
    state = pipe.init(jax.random.key(0), data[0][0])
    state, _ = pipe.step(state, data[0])
    with pytest.raises(ValueError, match="a batch of 7 does not divide over the 2 devices"):
        pipe.step(state, (data[1][0][:7], data[1][1][:7]))
    state, _ = pipe.step(state, data[1])
    assert state.tick == 2


@pytest.mark.parametrize("wrong", ["inputs", "labels", "structure"])
def test_a_batch_that_does_not_fit_loses_nothing(wrong):
    pipe = make(2)
    data = networks.batches(4)
    state = pipe.init(jax.random.key(0), data[0][0])
    state, _ = pipe.step(state, data[0])
    x, labels = data[1]
    bad = {
        "inputs": (x[:, :3], labels),
        "labels": (x, labels[:5]),
        "structure": ([x], labels),
    }
    message = r"batch 1: does not fit (stage 0 \(layers 0 to 2\)|loss_fn): "
    if wrong == "structure":
        message = r"inputs of the batch: the structure is \[\*\], that of init's example inputs \*"
    with pytest.raises(ValueError, match=message):
        pipe.step(state, bad[wrong])
    for batch in data[1:]:
        state, _ = pipe.step(state, batch)
    assert state.tick == 4


@pytest.mark.parametrize("batch", [3, np.ones((8, 4)), [np.ones(3)], {"x": 1, "y": 2}])
def test_a_batch_that_is_no_pair_is_refused(batch):
    pipe = make(2)
    state = pipe.init(jax.random.key(0), networks.batches(1)[0][0])
    with pytest.raises(ValueError, match=f"batch: is a {type(batch).__name__}.*; give a pair"):
        pipe.step(state, batch)
    state, _ = pipe.step(state, networks.batches(1)[0])
    assert state.tick == 1


def test_an_optimizer_that_takes_no_stage_is_refused():
    loss_fn, schedule = networks.loss_fn, fdg.schedule.backprop(1)
    with pytest.raises(ValueError, match=r"optimizer: called with stage 0 it fails: TypeError"):
        fdg.Pipeline([networks.dense(2)], loss_fn, lambda: optax.sgd(1), schedule)


def test_a_number_is_no_key():
    with pytest.raises(TypeError, match=r"key=0: is no JAX key; give jax.random.key\(seed\)"):
        make(2).init(0, networks.batches(1)[0][0])


@pytest.mark.parametrize(
    "loss_fn",
    [lambda y, t: (y.sum(-1), {}), lambda y, t: y.mean(), lambda y, t: (y.mean(), y)],
    ids=["no scalar", "no pair", "no dict"],
)
def test_a_loss_of_another_kind_is_refused(loss_fn):
    data = networks.batches(1)
    stages = [networks.dense(networks.CLASSES)]
    pipe = fdg.Pipeline(stages, loss_fn, networks.sgd(1, 1), fdg.schedule.backprop(1))
    state = pipe.init(jax.random.key(0), data[0][0])
    with pytest.raises(ValueError, match=r"loss_fn: returns .* must return the mean loss"):
        pipe.step(state, data[0])


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (
            lambda y, t: y.mean(),
            r"returns float\d\d\[\], but must return the mean loss .* loss, \{\}",
        ),
        (lambda y: (y.mean(), {}), r"fails on outputs .* and labels int.*: TypeError"),
    ],
    ids=["value", "failure"],
)
def test_init_names_the_loss(loss_fn, message):
    stages = [networks.dense(networks.CLASSES)]
    pipe = fdg.Pipeline(stages, loss_fn, networks.sgd(1, 1), fdg.schedule.backprop(1))
    with pytest.raises(ValueError, match=f"^loss_fn: {message}"):
        pipe.init(jax.random.key(0), *networks.batches(1)[0])


def test_an_example_without_labels_is_refused():
    with pytest.raises(ValueError, match=r"example: is a ndarray; give a pair"):
        make(2).template(np.ones((8, 4)))


def test_layers_that_are_not_partitioned_are_named():
    with pytest.raises(ValueError, match=r"stages has 3; .*partition\(layers, 2, example\)"):
        make(3, schedule=fdg.schedule.fdg(2))


def test_a_batch_that_fails_in_training_only_loses_nothing():
    def init(key, x):
        return jnp.ones((4, networks.CLASSES)), ()

    def apply(params, state, x, *, train, key):
        if train:  # groups of four
            x = x.reshape(-1, 4, x.shape[-1]).reshape(x.shape)
        return x @ params, state

    data = networks.batches(3)
    last = networks.dense(networks.CLASSES, lambda x: x)
    pipe = fdg.Pipeline(
        [fdg.Layer(init, apply), last], networks.loss_fn, networks.sgd(1, 2), fdg.schedule.fdg(2)
    )
    state = pipe.init(jax.random.key(0), data[0][0])
    for batch in data:
        state, _ = pipe.step(state, batch)
    with pytest.raises(ValueError, match=r"batch 3: does not fit stage 0 \(layer 0\): "):
        pipe.step(state, (data[0][0][:6], data[0][1][:6]))
    state, _ = pipe.step(state, data[0])
    assert state.tick == 4


def test_the_last_layer_may_have_outputs_that_only_training_uses():
    def apply(params, state, x, *, train, key):
        y = x @ params
        return ({"y": y, "auxiliary": 2 * y} if train else {"y": y}), state

    layer = fdg.Layer(lambda key, x: (jnp.ones((networks.WIDTH, networks.CLASSES)), ()), apply)

    def loss_fn(outputs, labels):
        loss, metrics = networks.loss_fn(outputs["y"], labels)
        return loss + 0.1 * networks.loss_fn(outputs["auxiliary"], labels)[0], metrics

    stages = [networks.dense(networks.WIDTH), layer]
    data = networks.batches(30)
    networks.assert_equals_oracle(
        stages, networks.sgd(1, 2), fdg.schedule.fdg(2), data, loss=loss_fn
    )


def test_metrics_of_micro_batches_are_means_and_keep_their_names():
    data = networks.batches(2)
    stages = [networks.dense(networks.WIDTH), networks.dense(networks.CLASSES, lambda x: x)]

    def step(metrics):
        def loss_fn(outputs, labels):
            return networks.loss_fn(outputs, labels)[0], metrics(outputs)

        schedule = fdg.schedule.gpipe(2, microbatches=4)
        pipe = fdg.Pipeline(stages, loss_fn, networks.sgd(1, 2), schedule)
        return pipe.step(pipe.init(jax.random.key(0), data[0][0]), data[0])[1]

    (found,) = step(lambda y: {"loss": 7.0 + 0 * y.mean(), "batch": y.mean()})
    assert found.loss > 0.5
    assert (found.aux["loss"], set(found.aux)) == (7.0, {"loss", "batch"})
    with pytest.raises(ValueError, match="give scalars that are means"):
        step(lambda y: {"outputs": y})


def test_a_copy_of_a_state_trains_on_alike():
    pipe = make(3)
    data = networks.batches(8)
    state = pipe.init(jax.random.key(0), data[0][0])
    for batch in data[:5]:
        state, _ = pipe.step(state, batch)
    copy = jax.tree.map(jnp.copy, state)
    ends = []
    for start in (state, copy):
        for batch in data[5:]:
            start, _ = pipe.step(start, batch)
        ends.append(pipe.params(pipe.drain(start)[0]))
    assert networks.difference(*ends) == 0


def test_training_makes_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        networks.run(make(2, fdg.schedule.backprop(2)), networks.batches(3))


def test_predictions_are_made_with_the_true_weights():
    data, schedule = networks.batches(9), fdg.schedule.fdg(3)
    stages = fdg.partition(networks.network(), 3, data[0][0], cost=[1] * 7)
    pipe = fdg.Pipeline(
        stages, networks.loss_fn, lambda k: fdg.delayed_sgd(0.1, 0.9, (schedule, k)), schedule
    )
    state = pipe.init(jax.random.key(7), data[0][0])
    for batch in data:
        state, _ = pipe.step(state, batch)
    x = data[0][0]
    for weights, same in ((pipe.true_params(state), True), (pipe.params(state), False)):
        y = x
        for k, stage in enumerate(pipe.stages):
            own = jax.device_get((weights[k], state.stages[k].model_state))
            y, _ = stage.layer.apply(*own, y, train=False, key=None)
        found = np.asarray(pipe.predict(state, x))
        assert (np.abs(found - np.asarray(y)).max() < 1e-12) == same
    plain = make(3)
    state = plain.init(jax.random.key(7), x)
    assert networks.difference(plain.true_params(state), plain.params(state)) == 0


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_parameters_without_a_gradient_are_named(dtype):
    def init(key, x):
        return {"w": jnp.ones(3), "order": jnp.zeros(3, dtype)}, ()

    layer = fdg.Layer(init, lambda p, s, x, *, train, key: (x * p["w"], s))

    def loss(y, t):
        return jnp.mean((y - t) ** 2), {}

    for optimizer in (optax.sgd(0.1), optax.adam(0.1)):
        pipe = fdg.Pipeline([layer, layer], loss, optimizer, fdg.schedule.fdg(2))
        with pytest.raises(
            ValueError, match=r"params: \['order'\] of layer 0 is .* keep it in the"
        ):
            pipe.init(jax.random.key(0), jnp.ones((4, 3)))
