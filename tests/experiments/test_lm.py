"""python -m experiments.lm: the network, the text, what a run writes, and how it refuses."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags

import fdg_jax as fdg
from experiments.common.errors import UsageError
from experiments.text import corpus
from experiments.text.settings import Settings, define_flags, from_flags
from experiments.text.task import Text, optimizer
from experiments.text.transformer import reversible_transformer, transformer
from experiments.training import loop, methods, setup
from experiments.training.remedies import kernels
from experiments.training.task import loss_fn
from tests import networks

ROOT = pathlib.Path(__file__).parents[2]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 5, (4, 6)), jnp.int32)


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    """Of a run that takes a moment, on a text in which few bytes can follow another."""
    # Which devices and caches there are is settled for all tests.
    monkeypatch.setattr(setup, "prepare_jax", lambda *arguments: None)
    (tmp_path / "poem").write_bytes(b"the cat sat on the mat.\n" * 40)
    sizes = {"width": 16, "blocks": 1, "heads": 2, "context": 8, "batch_size": 8}
    steps = {"steps": 60, "warmup_steps": 5, "eval_every_steps": 25, "learning_rate": 0.01}
    return Settings(str(tmp_path / "run"), f"file:{tmp_path / 'poem'}", **sizes, **steps)


def test_fdg_trains_writes_its_files_and_repeats_bit_for_bit(settings, tmp_path):
    first = loop.run(settings, Text)
    again = loop.run(dataclasses.replace(settings, workdir=str(tmp_path / "again")), Text)
    assert first["params_sha256"] == again["params_sha256"]
    assert first["validation_loss"] == again["validation_loss"] < 1  # ln 12 = 2.5 at the start
    assert (first["stages"], first["staleness"]) == (2, [2, 0])

    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == first
    config = json.loads((run / "config.json").read_text())
    assert bytes(config["vocabulary"]) == b"\n .acehmnost"
    assert config["train_bytes"] + config["validation_bytes"] == 960
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if m["split"] == "validation"] == [25, 50, 60]
    assert [m for m in lines if m["split"] == "train"][-1]["step"] == 60
    assert lines[-1]["loss"] == first["validation_loss"]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    assert loop.run(settings, Text) == first  # it is finished, and stays as it is
    with pytest.raises(UsageError, match=r"--width=8: the run in .* has width=16"):
        loop.run(dataclasses.replace(settings, width=8), Text)


def test_the_head_may_use_the_embeddings_table(settings):
    tied = dataclasses.replace(settings, tie_embedding=True, overwrite=True)
    pipe = setup.make(Text(tied)).pipe
    state = pipe.init(jax.random.key(0), *[jnp.zeros((8, 8), jnp.int32)] * 2)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(own)) for own in pipe.params(state)]
    plain = setup.make(Text(settings)).pipe
    state = plain.init(jax.random.key(0), *[jnp.zeros((8, 8), jnp.int32)] * 2)
    more = [sum(leaf.size for leaf in jax.tree.leaves(own)) for own in plain.params(state)]
    assert [b - a for a, b in zip(sizes, more, strict=True)] == [0, 12 * 16]
    assert loop.run(tied, Text)["validation_loss"] < 1.5
    with pytest.raises(UsageError, match="--tie_embedding"):
        dataclasses.replace(tied, method="dgl").check()
    with pytest.raises(UsageError, match="--tie_embedding"):
        dataclasses.replace(tied, method="petra", model="reversible_transformer").check()


@pytest.mark.slow
def test_it_trains_with_messages_of_a_byte_a_number(settings):
    int8 = dataclasses.replace(settings, message_dtype="int8")
    assert loop.run(int8, Text)["validation_loss"] < 1


@pytest.mark.parametrize("network", [transformer, reversible_transformer])
def test_three_stages_equal_the_oracle(network):
    rng = np.random.default_rng(1)
    data = [(x[:, :-1], x[:, 1:]) for x in rng.integers(0, 5, (9, 4, 7)).astype(np.int32)]
    stages = fdg.partition(network(5, 8, 1, 2), 3, data[0][0], cost=[1] * 3)
    optimizer = networks.sgd(0.5, 3)
    pipe, state = networks.assert_equals_oracle(
        stages, optimizer, fdg.schedule.fdg(3), data, loss_fn
    )
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(pipe.params(state)))


@pytest.mark.parametrize("made", [transformer, reversible_transformer])
def test_a_later_token_changes_nothing_before_it(made):
    network = fdg.chain(made(vocabulary=5, width=8, blocks=2, heads=2))
    params, state = jax.jit(network.init)(jax.random.key(0), TOKENS)
    # The initial weights are small, and what follows from a token would be, too.
    params = jax.tree.map(lambda leaf: 20 * leaf, params)

    @jax.jit
    def logits(tokens):
        return network.apply(params, state, tokens, train=False, key=None)[0]

    before = np.asarray(logits(TOKENS))
    for place in range(TOKENS.shape[1]):
        changed = np.asarray(logits(TOKENS.at[:, place].set((TOKENS[:, place] + 1) % 5)))
        np.testing.assert_array_equal(changed[:, :place], before[:, :place])
        assert (abs(changed - before)[:, place:].max(axis=(0, 2)) > 1e-3).all()


def test_reversible_blocks_are_undone_and_the_head_reads_the_mean():
    sizes = {"vocabulary": 5, "width": 8, "blocks": 2, "heads": 2}
    embedding, blocks, head = reversible_transformer(**sizes)
    _, _, plain_head = plain = transformer(**sizes)

    def run(layer, params, state, x):
        return layer.apply(params, state, x, train=True, key=None)[0]

    @jax.jit
    def results(params, state):
        streams = [run(embedding, params[0], state[0], TOKENS)]
        undone = []
        for _ in range(2):  # from equal streams, then from others
            streams.append(run(blocks, params[1], state[1], streams[-1]))
            undone.append(blocks.inverse(params[1], state[1], streams[-1], train=True, key=None))
        mean = (streams[-1][0] + streams[-1][1]) / 2
        logits = (
            run(head, params[2], state[2], streams[-1]),
            run(plain_head, params[2][1], (), mean),
        )
        return streams, undone, logits

    params, state = jax.jit(fdg.chain([embedding, blocks, head]).init)(jax.random.key(0), TOKENS)
    streams, undone, logits = results(jax.tree.map(lambda leaf: 20 * leaf, params), state)
    np.testing.assert_array_equal(*streams[0])
    for x, before, after in zip(undone, streams, streams[1:], strict=False):
        assert networks.difference(x, before) < 1e-9
        assert networks.difference(after, before) > 1
    np.testing.assert_allclose(*logits, rtol=1e-12)

    others, _ = jax.eval_shape(fdg.chain(plain).init, jax.random.key(0), TOKENS)
    ours, theirs = (sum(v.size for v in jax.tree.leaves(tree)) for tree in (params, others))
    assert ours == theirs
    assert sum(jax.tree.leaves(kernels(params))) == 5


@pytest.mark.slow
def test_a_reversible_transformer_is_trained_where_the_flag_says_so(settings):
    reversible = dataclasses.replace(settings, model="reversible_transformer")
    assert loop.run(reversible, Text)["validation_loss"] < 1


def test_a_stage_clips_by_its_share_and_shrinks_what_adamw_gives():
    settings = Settings("", num_stages=4, beta=0.5, momentum=0.5, clip_norm=1.0, warmup_steps=0)
    network = fdg.chain(transformer(vocabulary=5, width=8, blocks=1, heads=2))
    params, _ = jax.jit(network.init)(jax.random.key(0), TOKENS)
    gradient = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    assert optax.tree.norm(gradient) > 1

    @functools.partial(jax.jit, static_argnums=0)
    def second_update(optimizer):  # the first does not depend on b1
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        return optimizer.update(jax.tree.map(jnp.sin, gradient), state, params)[0]

    rate = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    plain = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(rate, b1=0.5, b2=0.95, weight_decay=0.1, mask=kernels),
    )
    for stage in (0, 3):
        want = jax.tree.map(lambda u, k=stage: 0.5 ** (3 - k) * u, second_update(plain))
        own = optimizer(settings, rate, methods.schedule(settings), stage)
        assert networks.difference(second_update(own), want) < 1e-12
    decayed = [path for path, is_one in jax.tree.leaves_with_path(kernels(params)) if is_one]
    assert len(decayed) == 5  # qkv, projection, expand, contract, logits
    assert all("kernel" in jax.tree_util.keystr(path) for path in decayed)


def test_labels_are_what_follows_and_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(100, dtype=np.uint8)
    text = corpus.Text("a", bytes(range(100)), tokens, tokens, "its hash")
    source, again, other = (corpus.Sequences(text, 7, 5, seed) for seed in (1, 1, 2))
    x, labels = next(source)
    assert x.shape == labels.shape == (5, 7)
    np.testing.assert_array_equal(labels, x + 1)
    assert (x != next(other)[0]).any()
    again.set_state(source.get_state())
    second = next(source)[0]
    assert (x != second).any()
    np.testing.assert_array_equal(next(again)[0], second)
    with pytest.raises(UsageError, match="--dataset: the text is not the one"):
        again.set_state({**source.get_state(), "text_sha256": "another"})
    x, labels = corpus.windows(tokens, 7)
    np.testing.assert_array_equal(x.reshape(-1), np.arange(14 * 7))
    np.testing.assert_array_equal(labels, x + 1)


def test_without_a_file_the_text_is_that_of_the_standard_library():
    source = corpus.load("python_docs", 0, 64)
    assert len(source.train) > 300_000
    assert len(source.validation) == (len(source.train) + len(source.validation)) // 10
    start = bytes(source.vocabulary[i] for i in source.train[:300])
    assert b"Command-line parsing library" in start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workdir": ""}, "--workdir: "),
        ({"dataset": "file:/no/such"}, "--dataset=file:/no/such: there is no such file"),
        ({"dataset": "file:/proc"}, "--dataset=file:/proc: it is no file"),
        ({"dataset": "file:/dev/zero"}, "--dataset=file:/dev/zero: it is no file"),
        ({"dataset": "file:/proc/self/mem"}, "--dataset=file:/proc/self/mem: cannot be read"),
        ({"dataset": "file:~nobody-of-this-name/x"}, "--dataset=file:~nobody"),
        ({"dataset": "poem"}, "--dataset=poem: must be python_docs or file:PATH"),
        ({"dataset": "file:"}, "--dataset=file:: must be python_docs or file:PATH"),
        ({"dataset": "file:a\0b"}, "--dataset='file:a"),
        ({"model": "rnn"}, "--model=rnn: no such choice; allowed are transformer, reversible"),
        ({"context": 96}, "--context=96: "),
        ({"context": 10**6}, "--context=1000000: "),
        ({"num_stages": 5}, "--num_stages=5: .* choose 1 to 3"),
        ({"num_stages": 0}, "--num_stages=0: "),
        ({"method": "magic"}, "--method=magic: "),
        ({"order": "any"}, "--order=any: "),
        ({"gradient": "fresh"}, "--gradient=fresh: "),
        ({"message_dtype": "int4"}, "--message_dtype=int4: no such choice; allowed are float32, "),
        ({"heads": 3}, "--heads=3: "),
        ({"width": 2**30}, f"--width={2**30}: "),
        ({"warmup_steps": 60}, "--warmup_steps=60: "),
        ({"seed": -1}, "--seed=-1: "),
        ({"steps": 2**31}, "--steps=2147483648: "),
        ({"beta": 0.0}, "--beta=0.0: "),
        ({"steps": 0, "epochs": 1, "warmup_steps": 30}, "--warmup_steps=30: .* 14 steps"),
        ({"learning_rate": 0.0}, "--learning_rate=0.0: "),
        ({"momentum": 1.0}, "--momentum=1.0: "),
        ({"optimizer": "sgd"}, "--optimizer=sgd: no such choice; allowed are adamw, muon"),
        ({"remedy": "spike"}, "--remedy=spike: no such choice with --optimizer=adamw; allowed"),
        ({"prediction_horizon": -1.0}, "--prediction_horizon=-1"),
        ({"average_decay": 1.0}, "--average_decay=1: "),
        ({"rate_anneal_steps": -1}, "--rate_anneal_steps=-1: "),
        ({"clip_norm": float("nan")}, "--clip_norm=nan: "),
        ({"weight_decay": -1.0}, "--weight_decay=-1.0: "),
        ({"validation_size": 960}, "--validation_size=960: "),
        ({"validation_size": 955}, "--context=8: "),
        ({"method": "gpipe", "microbatches": 3}, "--microbatches=3: "),
        ({"method": "adl", "accumulate": 61}, "--accumulate=61: "),
        ({"method": "data_parallel", "batch_size": 9}, "--batch_size=9: "),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(settings, change, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        loop.run(dataclasses.replace(settings, **change), Text)
    assert not pathlib.Path(settings.workdir).exists()


def test_the_program_says_one_line_and_ends_with_status_2(tmp_path):
    (tmp_path / "short").write_text("too short")
    arguments = [f"--dataset=file:{tmp_path / 'short'}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.lm", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: --context=64: ")
    assert not (tmp_path / "run").exists()


def test_flagfile():
    path = ROOT / "experiments" / "flags" / "lm_quick.cfg"
    values = flags.FlagValues()
    define_flags(values)
    assert values(["lm", f"--flagfile={path}", "--workdir=somewhere"]) == ["lm"]
    from_flags(values).check()
    assert path.read_text().startswith("# ")
    assert "expected" in path.read_text()
