"""What is not finite is found without waiting, and left out; what fails is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax import reference
from fdg_jax.checkpoint import Checkpointer
from fdg_jax.errors import NonFiniteError
from tests import networks
from tests.engine import failing

KEY = jax.random.key(7)
SCHEDULES = {
    "backprop": lambda k: fdg.schedule.backprop(k),
    "fdg": lambda k: fdg.schedule.fdg(k),
    "adl": lambda k: fdg.schedule.adl(k, accumulate=2),
    "gpipe": lambda k: fdg.schedule.gpipe(k, microbatches=2),
    "pipedream_2bw": lambda k: fdg.schedule.pipedream_2bw(k, accumulate=max(k, 2)),
}


def dense_layers() -> list[fdg.Layer]:
    last = networks.dense(networks.CLASSES, lambda x: x)
    return [networks.dense(networks.WIDTH), networks.dense(networks.WIDTH), last]


def make(layers, schedule, **options) -> fdg.Pipeline:
    k = schedule.num_stages
    cuts = [2, 4] if len(layers) > 3 else [1, 2]
    stages = fdg.partition(layers, k, jnp.ones((8, 4)), cost=cuts[: k - 1])
    return fdg.Pipeline(stages, networks.loss_fn, networks.sgd(0.5, k), schedule, **options)


def spoilt(count: int, *bad: int, rows: slice = slice(None)) -> list:
    """Batches some of which hold NaN."""
    data = networks.batches(count)
    for n in bad:
        data[n][0][rows, 1] = np.nan
    return data


def all_finite(state) -> bool:
    kept = [(s.params, s.model_state, s.opt_state) for s in state.stages]
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(kept)))


GRADIENTS = ("stale", "recompute_stale", "recompute")
CASES = [(name, GRADIENTS[i % 3]) for i, name in enumerate(SCHEDULES)]


@pytest.mark.parametrize(("name", "gradient"), CASES)
def test_where_all_is_finite_a_guarded_run_equals_the_oracle(name, gradient):
    layers = [networks.dense(networks.WIDTH), networks.batch_norm(), networks.dropout()]
    layers.append(networks.dense(networks.CLASSES, lambda x: x))
    schedule, data = SCHEDULES[name](2), networks.batches(9)
    stages = fdg.partition(layers, 2, data[0][0], cost=[1] * 4)
    pipe, state = networks.assert_equals_oracle(
        stages, networks.sgd(0.5, 2), schedule, data, gradient=gradient, on_nonfinite="stop"
    )
    assert pipe.skipped(state) == [0, 0]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_fdg_leaves_a_batch_out_as_an_optimizer_that_applies_only_what_is_finite(num_stages):
    schedule = fdg.schedule.fdg(num_stages)
    data = spoilt(12, 4, 5, 9)
    pipe = make(dense_layers(), schedule, on_nonfinite="skip")
    start = pipe.init(KEY, data[0][0])
    params = jax.device_get(pipe.params(start))
    state, metrics = networks.run(pipe, data)
    plain = networks.sgd(0.5, num_stages)
    stages = fdg.partition(dense_layers(), num_stages, data[0][0], cost=[1] * 3)
    empty = [s.model_state for s in start.stages]
    expected = reference.train(
        stages,
        networks.loss_fn,
        lambda k: optax.apply_if_finite(plain(k), 100),
        schedule,
        params,
        empty,
        KEY,
        data,
    )
    assert networks.difference(pipe.params(state), expected.params) <= 1e-12
    assert pipe.skipped(state) == [3] * num_stages
    assert [m.batch for m in metrics if not np.isfinite(m.loss)] == [4, 5, 9]


@pytest.mark.parametrize(("name", "gradient"), [*CASES, ("fdg", "stale"), ("gpipe", "recompute")])
def test_nothing_that_a_bad_batch_meets_is_spoilt(name, gradient):
    data = spoilt(14, 6)
    schedule = SCHEDULES[name](3)
    pipe = make(networks.network(), schedule, gradient=gradient, on_nonfinite="skip")
    state, _ = networks.run(pipe, data)
    assert all_finite(state)
    assert pipe.skipped(state) == [schedule.microbatches] * 3


def test_weights_and_statistics_are_those_of_a_run_without_the_batch():
    data = spoilt(8, 3)
    ends = []
    for own in (data, data[:3] + data[4:]):
        pipe = make(networks.network(dropping=False), SCHEDULES["backprop"](1), on_nonfinite="skip")
        state, _ = networks.run(pipe, own)
        ends.append(
            (state.stages[0].params, state.stages[0].model_state, state.stages[0].opt_state)
        )
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_mini_batch_goes_on_with_the_micro_batches_that_are_left(num_stages):
    half = networks.BATCH // 2
    data = spoilt(1, 0, rows=slice(half))
    schedule = fdg.schedule.gpipe(num_stages, microbatches=2)
    pipe = make(dense_layers(), schedule, on_nonfinite="skip")
    state, _ = networks.run(pipe, data)
    (x, labels) = data[0]
    rest = make(dense_layers(), fdg.schedule.backprop(num_stages))
    expected, _ = networks.run(rest, [(x[half:], labels[half:])])
    assert networks.difference(pipe.params(state), rest.params(expected)) <= 1e-12
    assert pipe.skipped(state) == [1] * num_stages


def test_an_accumulation_of_nothing_changes_nothing():
    pipe = make(dense_layers(), fdg.schedule.adl(1, accumulate=2), on_nonfinite="skip")
    data = spoilt(4, 2, 3)
    state = pipe.init(KEY, data[0][0])
    for i, batch in enumerate(data):
        if i == 2:
            before = jax.device_get((state.stages[0].params, state.stages[0].opt_state))
        state, _ = pipe.step(state, batch)
    after = jax.device_get((state.stages[0].params, state.stages[0].opt_state))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert pipe.skipped(state) == [2]


def test_a_sum_leaves_out_the_same():
    schedule = fdg.schedule.adl(1, accumulate=2, reduction="sum")
    ends = []
    for data in (spoilt(2, 1), networks.batches(1)):
        pipe = make(dense_layers(), schedule, on_nonfinite="skip")
        state, _ = networks.run(pipe, data)
        ends.append(pipe.params(state))
    assert networks.difference(*ends) <= 1e-12


def until_it_stops(pipe, data) -> tuple[int, NonFiniteError]:
    state = pipe.init(KEY, data[0][0])
    for i, batch in enumerate(data):
        try:
            with jax.transfer_guard("disallow"):
                batch = jax.device_put(batch, pipe.stages[0].replicated)
                state, _ = pipe.step(state, batch)
        except NonFiniteError as error:
            assert all_finite(state)
            return i, error
    raise AssertionError("did not stop")


def test_a_bad_input_stops_the_run_and_is_traced_to_the_first_stage():
    pipe = make(networks.network(), fdg.schedule.fdg(3), on_nonfinite="stop", max_ahead=2)
    step, error = until_it_stops(pipe, spoilt(14, 5))
    assert step <= 5 + 2
    assert (error.stage, error.batch) == (0, 5)
    assert "mini-batch 5: output or model state of stage 0 (layers 0 to " in str(error)


def infinite_loss(y, labels):
    return networks.loss_fn(y, labels)[0] / (labels[0] != 100), {}


def steep_loss(y, labels):
    """Finite at 0, where its derivative is not."""
    return jnp.sqrt(jnp.sum((y * (labels[0] != 100)) ** 2)), {}


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (infinite_loss, "mini-batch 5: loss or model state of stage 1 (layer 2) is not finite"),
        (steep_loss, "mini-batch 5: gradient or update of stage 1 (layer 2) is not finite"),
    ],
)
def test_a_bad_loss_is_traced_to_the_last_stage(loss, what):
    data = networks.batches(14)
    data[5][1][0] = 100
    layers = dense_layers()
    stages = fdg.partition(layers, 2, data[0][0], cost=[2])
    schedule = fdg.schedule.fdg(2)
    pipe = fdg.Pipeline(stages, loss, networks.sgd(1, 2), schedule, on_nonfinite="stop")
    _, error = until_it_stops(pipe, data)
    assert (error.stage, error.batch) == (1, 5)
    assert str(error).replace("layer 2", "layer 2) is not finite").startswith(what)


def test_what_is_found_in_the_drain_is_told_by_check():
    pipe = make(dense_layers(), fdg.schedule.fdg(3), on_nonfinite="stop", max_ahead=50)
    state, _ = networks.run(pipe, spoilt(5, 4))
    with pytest.raises(NonFiniteError, match="mini-batch 4"):
        pipe.check()
    assert all_finite(state)
    pipe.check()  # told once


def test_a_state_that_is_not_sound_is_not_saved(tmp_path):
    data = spoilt(6, 3)
    for mode, saved in (("stop", 2), ("skip", 6)):
        pipe = make(dense_layers(), fdg.schedule.fdg(2), on_nonfinite=mode, max_ahead=50)
        state = pipe.init(KEY, data[0][0])
        with Checkpointer(tmp_path, pipe) as checkpoints:
            for i, batch in enumerate(data):
                state, _ = pipe.step(state, batch)
                if i in (1, 5):
                    checkpoints.save(state, i + 1)
        assert checkpoints.latest() == saved
    again, _ = Checkpointer(tmp_path, pipe).restore(data[0])
    assert pipe.skipped(again) == pipe.skipped(state) == [1, 1]


def test_whether_anybody_looks_may_change(tmp_path):
    data = networks.batches(8)
    ends = []
    for modes in (("ignore", "skip"), ("skip", "ignore"), ("skip", "skip")):
        pipes = [make(networks.network(), fdg.schedule.fdg(2), on_nonfinite=m) for m in modes]
        state = pipes[0].init(KEY, data[0][0])
        for batch in data[:5]:
            state, _ = pipes[0].step(state, batch)
        folder = tmp_path / "-".join(modes)
        with Checkpointer(folder, pipes[0]) as checkpoints:
            checkpoints.save(state, 5)
        state, _ = Checkpointer(folder, pipes[1]).restore(data[0])
        for batch in data[5:]:
            state, _ = pipes[1].step(state, batch)
        ends.append(pipes[1].params(pipes[1].drain(state)[0]))
    assert networks.difference(ends[0], ends[2]) <= 1e-12
    assert networks.difference(ends[1], ends[2]) <= 1e-12


@pytest.mark.parametrize("schedule", [fdg.schedule.fdg(3), fdg.schedule.gpipe(3, microbatches=2)])
def test_a_program_that_fails_names_its_stage_its_layers_and_the_batch(schedule):
    error = failing.error_in_stage_1(schedule)
    assert (error.stage, error.batch) == (1, 5)
    assert str(error).startswith("stage 1 (layers 2 to 3), mini-batch 5, F: ")
    assert "this layer has had enough" in str(error)


def test_a_value_that_is_not_allowed_is_refused():
    with pytest.raises(ValueError, match="on_nonfinite='halt': allowed are ignore, stop, skip"):
        make(dense_layers(), fdg.schedule.fdg(2), on_nonfinite="halt")


def attention(mask_of=lambda mask: mask, wrap=lambda apply: apply) -> fdg.Layer:
    """Attention with an additive mask that travels along."""

    def init(key, x):
        h, _ = x
        return {"w": jax.random.normal(key, (h.shape[-1],) * 2) * 0.3}, jnp.zeros(())

    def apply(params, state, x):
        h, mask = x
        mask = mask_of(mask)
        weights = jax.nn.softmax(h @ jnp.swapaxes(h @ params["w"], -1, -2) + mask)
        return (h + weights @ h, mask), state + 1

    return fdg.Layer(init, lambda p, s, x, *, train, key: wrap(apply)(p, s, x))


def scanned(apply):
    def run(params, state, x):
        def body(carry, _):
            (h, mask), _ = apply(params, state, carry)
            return (h, mask * 1), None

        return jax.lax.scan(body, x, length=2)[0], state + 1

    return run


TRIANGLE = np.where(np.tril(np.ones((5, 5))), 0, -np.inf)
PASSED_ON = {
    "as it is": {},
    "reshaped": {"mask_of": lambda m: m.reshape(m.shape[0], -1).reshape(m.shape)},
    "cast": {"mask_of": lambda m: m.astype(jnp.float32)},
    "scaled": {"mask_of": lambda m: 2 * m},
    "made": {"mask_of": lambda m: jnp.where(jnp.arange(5) <= jnp.arange(5)[:, None], 0, -jnp.inf)},
    "jit": {"wrap": jax.jit},
    "checkpoint": {"wrap": jax.checkpoint},
    "scan": {"wrap": scanned},
    "cond": {"wrap": lambda apply: lambda *a: jax.lax.cond(a[1] > 99, apply, apply, *a)},
}


@pytest.mark.parametrize("form", PASSED_ON)
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_mask_that_travels_along_is_no_failure(form, mode):
    generator = np.random.default_rng(0)
    data = [
        ((generator.normal(size=(8, 5, 4)), np.stack([TRIANGLE] * 8)), np.zeros((8, 5, 4)))
        for _ in range(4)
    ]
    last = fdg.chain([attention(), fdg.from_fn(lambda x: x[0])])
    ends = []
    for one in ("ignore", mode):
        pipe = fdg.Pipeline(
            [attention(**PASSED_ON[form]), last],
            lambda y, t: (jnp.mean((y - t) ** 2), {}),
            optax.sgd(0.1),
            fdg.schedule.fdg(2),
            on_nonfinite=one,
        )
        state, _ = networks.run(pipe, data)
        pipe.check()
        assert pipe.skipped(state) == [0, 0]
        ends.append((pipe.params(state), [own.model_state for own in state.stages]))
    jax.tree.map(np.testing.assert_array_equal, *ends)


def finish(pipe: fdg.Pipeline, data: list) -> None:
    networks.run(pipe, data)
    pipe.check()


def test_what_a_stage_computes_beside_a_mask_is_a_failure():
    data = [((np.ones((8, 5, 4)), np.stack([TRIANGLE] * 8)), np.zeros((8, 5, 4)))] * 4
    data[2] = ((np.full((8, 5, 4), np.nan), data[2][0][1]), data[2][1])
    last = fdg.chain([attention(), fdg.from_fn(lambda x: x[0])])
    pipe = fdg.Pipeline(
        [attention(), last],
        lambda y, t: (jnp.mean((y - t) ** 2), {}),
        optax.sgd(0.1),
        fdg.schedule.fdg(2),
        on_nonfinite="stop",
    )
    with pytest.raises(NonFiniteError, match="mini-batch 2: output or model state of stage 0"):
        finish(pipe, data)


def test_nan_that_a_layer_without_weights_makes_is_a_failure():
    odd = fdg.from_fn(lambda x: jnp.sqrt(x))
    stages = [odd, *dense_layers()[1:2], fdg.chain(dense_layers()[2:])]
    data = [(np.abs(x), labels) for x, labels in networks.batches(5)]
    data[1][0][:, 0] = -1
    pipe = fdg.Pipeline(
        stages, networks.loss_fn, optax.sgd(0.1), fdg.schedule.fdg(3), on_nonfinite="stop"
    )
    with pytest.raises(NonFiniteError, match=r"mini-batch 1: .* stage 0 \(layer 0\)"):
        finish(pipe, data)


def test_elements_of_a_model_state_that_stay_are_no_failure():
    def init(key, x):
        return {"w": jnp.ones(())}, {"best": jnp.full(8, -jnp.inf), "n": jnp.zeros((), jnp.int32)}

    def apply(params, state, x, *, train, key):
        best = state["best"].at[state["n"] % 8].set(x.max())
        return x * params["w"], {"best": best, "n": state["n"] + 1} if train else state

    stages = [fdg.Layer(init, apply), dense_layers()[2]]
    pipe = fdg.Pipeline(
        stages, networks.loss_fn, optax.sgd(0.1), fdg.schedule.fdg(2), on_nonfinite="stop"
    )
    state, _ = networks.run(pipe, networks.batches(4))
    pipe.check()
    assert np.isfinite(state.stages[0].model_state["best"]).sum() == 4
