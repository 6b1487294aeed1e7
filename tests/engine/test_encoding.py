"""Messages in fewer bits: the rounding itself, and training with it against the oracle."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import fdg_jax as fdg
from fdg_jax.checkpoint import Checkpointer, convert
from fdg_jax.engine.encoding import Encoded, decode, encode, message_dtype, rounded
from fdg_jax.partition.cuts import units_of
from tests import networks
from tests.thinned import thinned

INT8, BFLOAT16, FLOAT16 = map(jnp.dtype, ("int8", "bfloat16", "float16"))
DATA = networks.batches(16)
# Compiled once for every shape.
ENCODE, DECODE = jax.jit(encode, static_argnums=1), jax.jit(decode)


def stages_of(num_stages: int) -> list[fdg.Layer]:
    return fdg.partition(networks.network(), num_stages, DATA[0][0], cost=[1] * 7)


def pipeline(schedule, **options) -> fdg.Pipeline:
    k = schedule.num_stages
    return fdg.Pipeline(stages_of(k), networks.loss_fn, networks.sgd(0.5, k), schedule, **options)


# --- The rounding itself.


@st.composite
def messages(draw):
    dtype = draw(st.sampled_from([np.float64, np.float32]))
    shape = draw(st.sampled_from([(7,), (4, 3), (1, 2), (0, 3), (2, 3, 1, 2)]))
    largest = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]))
    width = 8 * np.dtype(dtype).itemsize
    bound = float(dtype(largest))
    numbers = st.floats(-bound, bound, width=width, allow_subnormal=False)
    return draw(arrays.arrays(dtype, shape, elements=numbers))


@hypothesis.given(messages())
def test_int8_is_off_by_half_a_step_of_the_channel_at_most(value):
    sent = ENCODE(value, INT8)
    back = DECODE(sent)
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    assert (sent.values.dtype, sent.values.shape) == (jnp.int8, value.shape)
    channels = value.shape[-1] if value.ndim > 1 else 1
    assert sent.scale.shape == (1,) * (value.ndim - 1) + (channels,)
    assert sent.scale.dtype == jnp.float32
    # Beside the half, the rounding of a quotient and a product of at most 127 steps.
    step = np.asarray(sent.scale, value.dtype) * (0.5 + 256 * np.finfo(value.dtype).eps)
    least = 127 * np.finfo(np.float32).tiny  # of what is no zero
    assert (np.abs(np.asarray(back) - value) <= np.maximum(step, least)).all()


@hypothesis.given(messages(), st.sampled_from([BFLOAT16, FLOAT16]))
def test_a_cast_is_the_dtypes_own(value, dtype):
    sent = ENCODE(value, dtype)
    assert sent.scale is None
    assert sent.values.tobytes() == np.asarray(jnp.asarray(value).astype(dtype)).tobytes()
    assert DECODE(sent).dtype == value.dtype


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, INT8])
def test_the_oracles_boundary_is_the_same_rounding_inside_a_program(dtype):
    value = np.random.default_rng(0).normal(size=(5, 3))
    arrived = np.asarray(DECODE(ENCODE(value, dtype)))
    inside, pull = jax.vjp(jax.jit(lambda v: rounded(v, dtype)), value)
    np.testing.assert_array_equal(inside, arrived)
    np.testing.assert_array_equal(pull(value)[0], arrived)
    assert (arrived != value).any()


def test_channels_of_zeros_and_numbers_that_are_not_finite():
    value = jnp.array([[0.0, 1.0, jnp.nan, jnp.inf], [0.0, -2.0, 1.0, 1.0]])
    sent = encode(value, INT8)
    back = decode(sent)
    assert sent.scale[0, 0] == 0
    np.testing.assert_array_equal(back[:, 0], 0)
    np.testing.assert_allclose(back[:, 1], [1, -2], atol=1 / 127)
    assert not np.isfinite(back[0, 2:]).any()


def test_what_is_not_encoded():
    message = {
        "tokens": jnp.arange(3),
        "mask": jnp.ones((3, 2), bool),
        "scalar": jnp.float64(1),
        "narrow": jnp.ones((3, 2), jnp.bfloat16),
        "complex": jnp.ones(3, complex),
        "none": None,
    }
    for dtype in (BFLOAT16, FLOAT16):
        sent = encode(message, dtype)
        assert all(sent[name] is leaf for name, leaf in message.items())
    assert isinstance(encode(message, INT8)["narrow"], Encoded)
    assert encode(message, None) is message
    assert decode(message) == message


def test_an_unknown_dtype_is_refused():
    for given in (jnp.float32, "int4x", np.int32, 8):
        with pytest.raises(ValueError, match=r"message_dtype=.*: allowed are bfloat16, float16"):
            pipeline(fdg.schedule.fdg(2), message_dtype=given)
    assert message_dtype("int8") == INT8


# --- Training.

SCHEDULES = {
    "fdg": fdg.schedule.fdg,
    "ddg": fdg.schedule.ddg,
    "gpipe": lambda k: fdg.schedule.gpipe(k, microbatches=2),
    "adl": lambda k: fdg.schedule.adl(k, accumulate=2),
    "zero_bubble": lambda k: fdg.schedule.zero_bubble(k, microbatches=2),
}
PAIRS = [(name, rule) for name in ("fdg", "ddg", "gpipe") for rule in ("stale", "recompute")]
CASES = [
    (name, gradient, k, ("int8", "bfloat16")[(i + k) % 2])
    for i, (name, gradient) in enumerate(PAIRS)
    for k in (2, 3)
]
CASES += [
    ("fdg", "recompute_stale", 2, "bfloat16"),
    ("fdg", "stale", 2, "float16"),
    ("adl", "stale", 3, "int8"),
    ("zero_bubble", "recompute", 2, "int8"),
]


@pytest.mark.parametrize(("name", "gradient", "num_stages", "dtype"), thinned(CASES, keep=3))
def test_training_equals_the_oracle(name, gradient, num_stages, dtype):
    networks.assert_equals_oracle(
        stages_of(num_stages),
        networks.sgd(0.5, num_stages),
        SCHEDULES[name](num_stages),
        DATA,
        gradient=gradient,
        message_dtype=dtype,
    )


def test_local_losses_equal_the_oracle():
    def local_loss(outputs, labels):
        return networks.loss_fn(outputs[:, : networks.CLASSES], labels)

    networks.assert_equals_oracle(
        stages_of(2),
        networks.sgd(1, 2),
        fdg.schedule.local(2),
        DATA,
        loss=[local_loss, networks.loss_fn],
        message_dtype=INT8,
    )


@pytest.mark.parametrize("dtype", thinned(["bfloat16", "int8"], keep=2))
def test_reconstructed_inputs_are_rounded_too(dtype):
    layers = networks.reversible_network()
    stages = fdg.partition(layers, 3, DATA[0][0], cost=[1] * len(units_of(layers)))
    optimizer, schedule = networks.sgd(0.5, 3), fdg.schedule.fdg(3)
    networks.assert_equals_oracle(
        stages, optimizer, schedule, DATA, gradient="reversible", message_dtype=dtype
    )


# How far the parameters may be from those without rounding after 16 steps, of their norm.
BOUNDS = {"bfloat16": 2e-3, "int8": 1e-2}


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_rounding_moves_the_parameters_little(dtype):
    ends = []
    for narrow in (None, dtype):
        pipe = pipeline(fdg.schedule.fdg(3), message_dtype=narrow)
        ends.append(jax.device_get(pipe.params(networks.run(pipe, DATA)[0])))
    off = norm(jax.tree.map(np.subtract, *ends)) / norm(ends[0])
    assert 0 < off < BOUNDS[dtype]


def encoded(tree) -> list[Encoded]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Encoded))
    return [leaf for leaf in leaves if isinstance(leaf, Encoded)]


@pytest.mark.parametrize("gradient", ["stale", "recompute"])
def test_what_waits_is_encoded_and_the_state_keeps_its_structure(gradient):
    pipe = pipeline(fdg.schedule.fdg(3), gradient=gradient, message_dtype=jnp.int8)
    template = pipe.template(DATA[0])
    expected = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(template)]
    state = pipe.init(jax.random.key(0), *DATA[0])
    for batch in DATA[:7]:
        state, _ = pipe.step(state, batch)
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)] == expected
    assert not encoded(state.stages[0].flights)
    for k in (0, 1):
        assert len(encoded(state.stages[k].inbox["cotangent"])) == 1
        assert len(encoded(state.stages[k + 1].inbox["activation"])) == 1
    # What a batch in flight keeps of its input is what came.
    assert len(encoded([stash.inputs for stash in state.stages[1].flights.values])) == 2
    for own, there in zip(state.stages, template.stages, strict=True):
        assert jax.tree.structure(own.inbox) == jax.tree.structure(there.inbox)
        pairs = zip(jax.tree.leaves(own.inbox), jax.tree.leaves(there.inbox), strict=True)
        assert all(v.sharding == w.sharding for v, w in pairs if isinstance(v, jax.Array))


def test_evaluation_is_exact():
    pipes = [pipeline(fdg.schedule.fdg(2), message_dtype=dtype) for dtype in (None, jnp.int8)]
    states = [pipe.init(jax.random.key(0), *DATA[0]) for pipe in pipes]
    one, two = (p.predict(s, DATA[1][0]) for p, s in zip(pipes, states, strict=True))
    np.testing.assert_array_equal(one, two)


def test_groups_of_devices_change_nothing_but_rounding():
    ends = []
    for devices in (jax.devices()[:2], jax.devices()[:4]):
        pipe = pipeline(fdg.schedule.fdg(2), devices=devices, message_dtype=jnp.int8)
        state, _ = networks.run(pipe, DATA)
        ends.append(jax.device_get(pipe.params(state)))
    assert networks.difference(*ends) <= 1e-12


def test_one_stage_sends_nothing():
    ends = []
    for dtype in (None, jnp.int8):
        pipe = pipeline(fdg.schedule.fdg(1), message_dtype=dtype)
        ends.append(pipe.params(networks.run(pipe, DATA[:6])[0]))
    assert networks.difference(*ends) == 0


def test_tokens_travel_beside_activations():
    def embed(key, x):
        return jax.random.normal(key, (5, 4)), ()

    def first(params, state, tokens, *, train, key):
        return {"x": params[tokens], "tokens": tokens}, state

    def second(params, state, message, *, train, key):
        return message["x"] @ params[:, :4].T * (message["tokens"] > 0)[..., None], state

    stages = [fdg.Layer(embed, first), fdg.Layer(embed, second)]
    rng = np.random.default_rng(0)
    data = [(rng.integers(0, 5, (8, 3)), rng.integers(0, 5, (8, 3))) for _ in range(12)]
    pipe, state = networks.assert_equals_oracle(
        stages, lambda k: optax.sgd(0.1), fdg.schedule.fdg(2), data, message_dtype=INT8
    )
    state, _ = pipe.step(state, data[0])
    (came,) = (value for _, value in state.stages[1].inbox["activation"].items())
    assert isinstance(came["x"], Encoded)
    np.testing.assert_array_equal(came["tokens"], data[0][0])


def test_a_number_that_is_not_finite_is_still_found():
    pipe = pipeline(fdg.schedule.fdg(2), message_dtype=jnp.int8, on_nonfinite="skip")
    state = pipe.init(jax.random.key(0), *DATA[0])
    for n, (x, labels) in enumerate(DATA[:8]):
        state, _ = pipe.step(state, (np.full_like(x, np.nan) if n == 3 else x, labels))
    state, _ = pipe.drain(state)
    assert pipe.skipped(state) == [1, 1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pipe.params(state)))


# --- Checkpoints.


def bits(state) -> list[bytes]:
    arrays = [(own.params, own.model_state, own.opt_state) for own in state.stages]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(arrays)]


@pytest.mark.parametrize("gradient", ["stale", "recompute"])
def test_a_restored_run_goes_on_to_the_bit(gradient, tmp_path):
    options = {"gradient": gradient, "message_dtype": jnp.int8}
    pipe = pipeline(fdg.schedule.fdg(3), **options)
    state = pipe.init(jax.random.key(7), *DATA[0])
    for batch in DATA[:7]:
        state, _ = pipe.step(state, batch)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, 7)
    fresh = pipeline(fdg.schedule.fdg(3), **options)
    again, _ = Checkpointer(tmp_path, fresh).restore(DATA[0])
    ends = []
    for one, own in ((pipe, state), (fresh, again)):
        for batch in DATA[7:14]:
            own, _ = one.step(own, batch)
        ends.append(bits(one.drain(own)[0]))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(("made", "here"), [(None, "int8"), ("int8", None), ("int8", "bfloat16")])
def test_a_checkpoint_of_another_message_dtype_is_refused_and_can_be_converted(
    made, here, tmp_path
):
    source, target = (pipeline(fdg.schedule.fdg(2), message_dtype=d) for d in (made, here))
    state = source.init(jax.random.key(7), *DATA[0])
    for batch in DATA[:5]:
        state, _ = source.step(state, batch)
    with Checkpointer(tmp_path, source) as checkpoints:
        checkpoints.save(state, 5)
    match = f"message_dtype: .* was made with {made}, this pipeline has {here}; restore it with"
    with pytest.raises(ValueError, match=match):
        Checkpointer(tmp_path, target).restore(DATA[0])
    state = convert(source, state, target, *DATA[0])
    state, _ = target.step(state, DATA[5])
    assert int(state.tick) == 6
    assert bool(encoded(state)) == (here is not None)
