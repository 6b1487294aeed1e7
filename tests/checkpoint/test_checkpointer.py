"""Checkpoints: a restored run goes on as if it had never stopped, to the bit."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
from fdg_jax.checkpoint import Checkpointer, manifest
from fdg_jax.partition.cuts import units_of
from tests import networks
from tests.thinned import thinned

SCHEDULES = {
    "fdg": fdg.schedule.fdg,
    "adl": lambda k: fdg.schedule.adl(k, accumulate=3),
    "gpipe": lambda k: fdg.schedule.gpipe(k, microbatches=2),
    "ddg": fdg.schedule.ddg,
    "pipedream_2bw": lambda k: fdg.schedule.pipedream_2bw(k, accumulate=max(k, 2)),
}


def make(schedule=None, width=networks.WIDTH, **options) -> fdg.Pipeline:
    schedule = schedule or fdg.schedule.fdg(3)
    k = schedule.num_stages
    layers = [
        networks.dense(networks.WIDTH),
        networks.batch_norm(),
        networks.dropout(),
        networks.dense(width),
        networks.batch_norm(),
        networks.dense(networks.CLASSES, lambda x: x),
    ]
    if options.get("gradient") == "reversible":
        layers = networks.reversible_network()
    costs = [1] * len(units_of(layers))
    stages = fdg.partition(layers, k, networks.batches(1)[0][0], cost=costs)
    return fdg.Pipeline(stages, networks.loss_fn, networks.sgd(0.5, k), schedule, **options)


def train(pipe, state, data, metrics):
    for batch in data:
        state, m = pipe.step(state, batch)
        metrics += m
    return state


def assert_same(a, b) -> None:
    """Equal structure, equal bits, equal places."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        if isinstance(x, jax.Array):
            assert x.devices() == y.devices()
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def shown(state) -> list:
    """Everything but residuals, whose tree structure is that of one tracing."""
    return [
        (
            stage._replace(flights=[stash._replace(residuals=None) for stash in stashes]),
            [stash.residuals.arrays for stash in stashes if stash.residuals is not None],
        )
        for stage in state.stages
        for stashes in [stage.flights.values]
    ]


# Every schedule with every gradient, K and the moment of the save going round; and FDG in its fill.
GRADIENTS = ("stale", "recompute_stale", "recompute")
CASES = [
    (name, gradient, (i + j) % 3 + 1, (2 * i + j) % 5 + 3)
    for i, name in enumerate(SCHEDULES)
    for j, gradient in enumerate(GRADIENTS)
]
CASES += [("fdg", gradient, 3, 1 + j) for j, gradient in enumerate(GRADIENTS)]
CASES += [("fdg", "reversible", 3, 6), ("adl", "reversible", 4, 7), ("gpipe", "reversible", 2, 3)]
CASES += [("fdg", "reconstruct", 3, 2), ("ddg", "reconstruct", 3, 6), ("adl", "reconstruct", 3, 7)]


@pytest.mark.parametrize(("name", "gradient", "num_stages", "before"), thinned(CASES, keep=3))
def test_a_restored_run_goes_on_to_the_bit(name, gradient, num_stages, before, tmp_path):
    pipe = make(SCHEDULES[name](num_stages), gradient=gradient)
    data = networks.batches(12)
    metrics = []
    state = pipe.init(jax.random.key(7), *data[0])
    state = train(pipe, state, data[:before], metrics)
    kept = shown(jax.tree.map(jnp.copy, state))
    seen = len(metrics)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, before, {"metrics": seen})
        state = train(pipe, state, data[before:10], metrics)  # donates what was saved
        state, rest = pipe.drain(state)

    fresh = make(SCHEDULES[name](num_stages), gradient=gradient)
    again, extra = Checkpointer(tmp_path, fresh).restore(data[0])
    assert_same(shown(again), kept)
    assert extra == {"metrics": seen}
    other = metrics[:seen]
    again = train(fresh, again, data[before:10], other)
    again, last = fresh.drain(again)
    assert_same(shown(again), shown(state))
    assert_same(other + last, metrics + rest)


def test_a_drained_state_is_restored_and_fills_again(tmp_path):
    pipe, data = make(), networks.batches(8)
    state, _ = networks.run(pipe, data[:4])
    checkpoints = Checkpointer(tmp_path, pipe)
    checkpoints.save(state, 4)
    again, extra = checkpoints.restore(data[0])
    assert extra is None
    ends = [pipe.drain(train(pipe, start, data[4:], []))[0] for start in (state, again)]
    assert_same(shown(ends[0]), shown(ends[1]))


def test_a_group_of_devices_gets_its_arrays_back(tmp_path):
    data = networks.batches(7)
    pipes = [make(fdg.schedule.fdg(2), devices=jax.devices()[:4]) for _ in range(2)]
    state = train(pipes[0], pipes[0].init(jax.random.key(7), data[0][0]), data[:5], [])
    with Checkpointer(tmp_path, pipes[0]) as checkpoints:
        checkpoints.save(state, 5)
    again, _ = Checkpointer(tmp_path, pipes[1]).restore(data[0])
    (a,), (b,) = (s.stages[0].inbox["cotangent"].values for s in (state, again))
    assert jax.tree.leaves(a)[0].sharding.spec == jax.tree.leaves(b)[0].sharding.spec
    ends = [
        p.drain(train(p, s, data[5:], []))[0] for p, s in zip(pipes, (state, again), strict=True)
    ]
    assert_same(shown(ends[0]), shown(ends[1]))


def test_bytes_arrays_and_empty_leaves_travel_as_well(tmp_path):
    layer = fdg.Layer(
        lambda key, x: ({"w": jnp.ones(()), "none": jnp.zeros((0, 3), jnp.bfloat16)}, ()),
        lambda p, s, x, *, train, key: (p["w"] * x, s),
    )
    loss = lambda y, t: (jnp.mean((y - t) ** 2), {})  # noqa: E731
    pipe = fdg.Pipeline([layer], loss, lambda k: optax.sgd(0.1), fdg.schedule.fdg(1))
    batch = (np.ones((4, 1)), np.zeros((4, 1)))
    state = pipe.init(jax.random.key(0), batch[0])
    checkpoints = Checkpointer(tmp_path, pipe)
    checkpoints.save(state, 0, b"\0\xff")
    again, extra = checkpoints.restore(batch)
    assert extra == b"\0\xff"
    assert_same(shown(again), shown(state))
    checkpoints.save(state, 1, {"loss": [jnp.float32(0.1)], "n": 3})
    assert checkpoints.restore(batch)[1] == {"loss": [float(np.float32(0.1))], "n": 3}


def test_the_newest_stay(tmp_path):
    pipe = make()
    state = pipe.init(jax.random.key(0), networks.batches(1)[0][0])
    checkpoints = Checkpointer(tmp_path, pipe, keep=2)
    assert checkpoints.latest() is None
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoints.restore(networks.batches(1)[0])
    (tmp_path / ".step-000000001").mkdir()  # of a save that was killed
    for step in (2, 5, 11):
        checkpoints.save(state, step)
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000005", "step-000000011"]
    assert checkpoints.latest() == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": fdg.schedule.fdg(2)}, r"stages: .* made with 3, this pipeline has 2;"),
        ({"schedule": fdg.schedule.adl(3, accumulate=2)}, r"schedule: .* with fdg .* has adl "),
        ({"schedule": fdg.schedule.fdg(3, order="backward_first")}, r"with fdg .* has fdg "),
        ({"gradient": "recompute"}, r"gradient: .* made with stale, this pipeline has recompute;"),
        ({"width": 5}, r"params\[\d\].*: the checkpoint has float64\[\d.*\], this pipeline float"),
    ],
)
def test_another_configuration_is_refused(saved, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        Checkpointer(saved, make(**change)).restore(networks.batches(1)[0])
    assert "\n" not in str(caught.value)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpointer(tmp_path, make(), keep=0)
    with pytest.raises(ValueError, match="step=-1"):
        Checkpointer(tmp_path, make()).save(None, -1)


def test_what_a_save_that_was_killed_has_left_is_removed(tmp_path):
    pipe, data = make(), networks.batches(4)
    state = pipe.init(jax.random.key(7), data[0][0])
    with Checkpointer(tmp_path, pipe, keep=4) as checkpoints:
        for step in range(4):
            checkpoints.save(state, step, score=0.5 if step == 1 else None)
    (tmp_path / ".step-000000004").mkdir()
    (tmp_path / "step-000000000" / "manifest.json").unlink()
    Checkpointer(tmp_path, pipe, keep=1).tidy()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000001", "step-000000003"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> pathlib.Path:
    """Checkpoints of steps 3 and 5, whose extra is the step."""
    folder, pipe, data = tmp_path_factory.mktemp("two"), make(), networks.batches(5)
    state = train(pipe, pipe.init(jax.random.key(7), data[0][0]), data[:3], [])
    with Checkpointer(folder, pipe) as checkpoints:
        checkpoints.save(state, 3, 3)
        checkpoints.save(train(pipe, state, data[3:], []), 5, 5)
    return folder


@pytest.fixture
def saved(two, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(two, tmp_path / "saved"))


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [cut, flip, pathlib.Path.unlink, lambda p: p.write_text("")])
@pytest.mark.parametrize("name", ["manifest.json", "arrays/stage_1/manifest.ocdbt", "arrays/*/d/*"])
def test_a_damaged_checkpoint_is_named_and_an_older_one_used(saved, name, damage):
    damage(max((saved / "step-000000005").glob(name), key=lambda p: p.stat().st_size))
    pipe = make()
    checkpoints = Checkpointer(saved, pipe, keep=1)
    with pytest.warns(UserWarning, match=r"step-000000005 is damaged .* passed over"):
        state, extra = checkpoints.restore(networks.batches(1)[0])
    assert (state.tick, extra) == (3, 3)
    # The next save is the newest good one, and takes the damaged one's place.
    checkpoints.save(state, 4)
    checkpoints.close()
    assert [p.name for p in saved.iterdir()] == ["step-000000004"]


@pytest.mark.parametrize("change", ["missing stage", "added file", "link", "not an object"])
def test_other_damage(saved, change):
    folder = saved / "step-000000005"
    if change == "missing stage":
        shutil.rmtree(folder / "arrays" / "stage_2")
    elif change == "added file":
        (folder / "arrays" / "more").write_text("")
    elif change == "link":
        (folder / "arrays" / "more").symlink_to("/")
    else:
        (folder / "manifest.json").write_text("[" * 10**5)
    with pytest.warns(UserWarning, match="step-000000005 is damaged"):
        assert Checkpointer(saved, make()).restore(networks.batches(1)[0])[1] == 3


def test_no_whole_checkpoint_is_an_error(saved):
    for path in saved.glob("*/manifest.json"):
        cut(path)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="none of the checkpoints 5, 3 in it is whole"),
    ):
        Checkpointer(saved, make()).restore(networks.batches(1)[0])


def test_a_save_that_fails_warns_and_leaves_the_older_ones(saved, monkeypatch):
    pipe, data = make(), networks.batches(8)
    checkpoints = Checkpointer(saved, pipe)
    state, _ = checkpoints.restore(data[0])

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fdg_jax.checkpoint.manifest.write", full)
        checkpoints.save(state, 6)
        with pytest.warns(UserWarning, match=r"step-000000006 could not be written .*No space"):
            checkpoints.close()
    assert sorted(p.name for p in saved.iterdir()) == ["step-000000003", "step-000000005"]
    checkpoints.save(train(pipe, state, data[5:6], []), 6)
    checkpoints.close()
    assert checkpoints.latest() == 6


def test_another_machine_is_a_warning(saved, monkeypatch):
    path = saved / "step-000000005" / "manifest.json"
    pipe, example = make(), networks.batches(1)[0]
    state, _ = Checkpointer(saved, pipe).restore(example)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "__version__", "0.0")
        with Checkpointer(saved, pipe) as checkpoints:
            checkpoints.save(state, 7)
    with pytest.warns(UserWarning, match=r"jax: .* made with 0\.0, .*last bits may differ"):
        Checkpointer(saved, pipe).restore(example)
    assert json.loads(path.read_text())["body"]["cores"] >= 1


def test_nothing_is_unpickled(saved, monkeypatch):
    import pickle

    def refuse(*arguments, **options):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    Checkpointer(saved, make()).restore(networks.batches(1)[0])


def test_schedules_that_print_alike_are_told_apart(tmp_path):
    pipes = [make(fdg.schedule.adl(2, accumulate=m)) for m in (10, 20)]
    data = networks.batches(1)
    with Checkpointer(tmp_path, pipes[0]) as checkpoints:
        checkpoints.save(pipes[0].init(jax.random.key(0), *data[0]), 0)
    with pytest.raises(ValueError, match=r"schedule: .* made with adl .*, this pipeline has adl "):
        Checkpointer(tmp_path, pipes[1]).restore(data[0])


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt(), ValueError("bad")])
def test_whatever_ends_the_block_the_save_is_not_lost(end, tmp_path):
    pipe = make()
    state = pipe.init(jax.random.key(0), *networks.batches(1)[0])

    def block() -> None:
        with Checkpointer(tmp_path, pipe) as checkpoints:
            checkpoints.save(state, 1)
            raise end

    with pytest.raises(type(end)):
        block()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
    assert Checkpointer(tmp_path, pipe).restore(networks.batches(1)[0])[1] is None


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys_travel_as_well(impl, tmp_path):
    def init(key, x):
        return jnp.ones(()), {"key": jax.random.key(5, impl=impl)}

    def apply(params, state, x, *, train, key):
        return params * x, {"key": jax.random.split(state["key"])[0]} if train else state

    def keyed(params):
        return jax.random.key(9, impl=impl)

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -0.1 * g, updates), jax.random.fold_in(state, 1)

    def loss(outputs, labels):
        return jnp.mean((outputs - labels) ** 2), {}

    layer = fdg.Layer(init, apply)
    optimizer = optax.GradientTransformation(keyed, update)
    pipe = fdg.Pipeline([layer, layer], loss, optimizer, fdg.schedule.fdg(2))
    batch = (np.ones((4, 1)), np.zeros((4, 1)))
    state = pipe.init(jax.random.key(0), *batch)
    for _ in range(5):
        state, _ = pipe.step(state, batch)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, 5)
        again, _ = checkpoints.restore(batch)
    assert_same(again, state)


def test_what_cannot_be_read_back_is_refused_by_save(tmp_path):
    pipe = make()
    state = pipe.init(jax.random.key(0), *networks.batches(1)[0])
    checkpoints = Checkpointer(tmp_path, pipe)
    for extra in (
        *({1, 2}, {"path": pathlib.Path("a")}, object(), {"a": [{1: 2}]}, {None: 1}),
        *({"key": jax.random.key(0)}, np.array([1j]), np.array(["2026-01-01"], "datetime64")),
    ):
        with pytest.raises(ValueError, match="extra: cannot be stored"):
            checkpoints.save(state, 1, extra)
    first, *rest = state.stages
    odd = first._replace(model_state=np.zeros(3, jnp.uint2))
    with pytest.raises(ValueError, match="dtype uint2 cannot be stored"):
        checkpoints.save(state._replace(stages=(odd, *rest)), 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gs://bucket/run", "s3://bucket", "file:///x", "hdfs://a/b"])
def test_a_path_with_a_scheme_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (name, pathlib.Path(name)):
        with pytest.raises(ValueError, match="is no local folder; name one"):
            Checkpointer(path, make())
    assert not list(tmp_path.iterdir())


def test_what_can_be_no_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file", tmp_path / "file" / "run", "", "a\0b", "~nobody-here/run"):
        with pytest.raises(ValueError, match="directory="):
            Checkpointer(name, make())
    pipe = make()
    state = pipe.init(jax.random.key(0), *networks.batches(1)[0])
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match=r"directory=.*: cannot be written \(Permission denied\)"):
        Checkpointer(tmp_path, pipe).save(state, 1)


def test_a_step_is_any_whole_number_and_a_score_any_number(tmp_path):
    pipe, batch = make(), networks.batches(1)[0]
    state = pipe.init(jax.random.key(0), *batch)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        for i, step in enumerate((np.int64(1), jnp.int32(2))):
            checkpoints.save(state, step, score=jnp.float32(i))
        for step in (1.0, "1", None, -1, 2**31):
            with pytest.raises(ValueError, match="step="):
                checkpoints.save(state, step)
        with pytest.raises(ValueError, match="score='low'"):
            checkpoints.save(state, 3, score="low")
    assert manifest.steps(tmp_path) == [2, 1]


def test_extra_is_what_it_was_when_save_was_called(tmp_path):
    pipe, batch = make(), networks.batches(1)[0]
    state = pipe.init(jax.random.key(0), *batch)
    seen, last, array = [1], jnp.float32(0.5), np.array([1, 2])
    extra = {"seen": seen, "last": last, "pair": (1, 2), "array": array, "big": 2**70}
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(state, 1, extra)
        seen.append(2)
        array[:] = 0
        last.delete()
        found = checkpoints.restore(batch)[1]
    assert found == {"seen": [1], "last": 0.5, "pair": [1, 2], "array": [1, 2], "big": 2**70}


@pytest.mark.parametrize(
    "extra",
    [
        b"x" * (26 << 20),
        {"a": "x" * (33 << 20)},
        pytest.param([0] * (12 << 20), marks=pytest.mark.slow),
    ],
)
def test_extra_too_large_to_be_read_back_is_refused(extra, tmp_path):
    pipe, batch = make(), networks.batches(1)[0]
    state = pipe.init(jax.random.key(0), *batch)
    with pytest.raises(ValueError, match=r"extra: takes .* characters, and .* can be read back"):
        Checkpointer(tmp_path, pipe).save(state, 1, extra)
    loop = []
    loop.append(loop)
    for odd in (loop, 10**5000, last_deleted()):
        with pytest.raises(ValueError, match="extra: cannot be stored"):
            Checkpointer(tmp_path, pipe).save(state, 1, odd)


def last_deleted() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


# Saves, and ends without a word to the checkpointer.
ENDS = """
import os, signal, sys
import jax
from fdg_jax.checkpoint import Checkpointer, manifest
from tests import networks
from tests.checkpoint.test_checkpointer import make

pipe, batch = make(), networks.batches(1)[0]
checkpoints = Checkpointer(sys.argv[1], pipe)
checkpoints.save(pipe.init(jax.random.key(0), *batch), 1)
how = sys.argv[2]
if how == "exit":
    sys.exit(3)
if how == "error":
    raise ValueError("bad")
if how == "interrupt":
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("how", thinned(["return", "exit", "error", "interrupt"], keep=2))
def test_whatever_ends_the_program_the_save_is_not_lost(how, tmp_path):
    subprocess.run(
        [sys.executable, "-c", ENDS, str(tmp_path), how],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_ENABLE_X64": "1"},
        capture_output=True,
        timeout=120,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_home_is_expanded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"directory=~nobody-of-this-name/a: cannot be found"):
        Checkpointer("~nobody-of-this-name/a", make())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Checkpointer("~/run", make()).directory == tmp_path / "run"


def test_a_consumed_state_is_not_saved(tmp_path):
    pipe, data = make(), networks.batches(6)
    state = pipe.init(jax.random.key(0), *data[0])
    for batch in data:
        old = state
        state, _ = pipe.step(state, batch)
    with Checkpointer(tmp_path, pipe) as checkpoints:
        with pytest.raises(fdg.ConsumedStateError):
            checkpoints.save(old, 1)
        checkpoints.save(state, 6)
    assert checkpoints.latest() == 6


def test_what_differs_is_named(tmp_path):
    data = networks.batches(1)[0]
    pipe = make()
    with Checkpointer(tmp_path, pipe) as checkpoints:
        checkpoints.save(pipe.init(jax.random.key(0), *data), 0)
    early = make(fdg.schedule.fdg(3, order="backward_first"))
    for other, message in (
        (early, "the arguments of the schedule differ, such as order"),
        (make(fdg.schedule.ddg(3)), "made with fdg .* this pipeline has ddg .*; restore it with"),
        (make(fdg.schedule.fdg(2)), r"stages: .*fdg_jax\.checkpoint\.convert"),
    ):
        with pytest.raises(ValueError, match=message):
            Checkpointer(tmp_path, other).restore(data)
    with pytest.raises(ValueError, match="example: is a ndarray; give a pair"):
        Checkpointer(tmp_path, make()).restore(data[0])
