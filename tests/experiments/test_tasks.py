"""What programs make of a run on text, as of one on images, and what the two have in common."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from absl import flags

import fdg_jax as fdg
from experiments import compare, export, report
from experiments.common.errors import UsageError
from experiments.comparing.records import finished
from experiments.exporting import model_file
from experiments.tasks import PROGRAMS, TASKS, program_flag, settings_of, task_of
from experiments.text import corpus
from experiments.text.settings import Settings
from experiments.text.task import Text
from experiments.training import loop, resume, setup
from experiments.training.config import Config

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {"width": 16, "blocks": 2, "heads": 2, "context": 8, "batch_size": 8, "warmup_steps": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a text in which few bytes can follow another; JAX's devices are those of all tests."""
    root = tmp_path_factory.mktemp("text")
    (root / "poem").write_bytes(b"the cat sat on the mat.\n" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "prepare_jax", lambda *arguments: None)
        yield root


def train(folder, name, **changes) -> dict:
    settings = Settings(
        str(folder / name),
        f"file:{folder / 'poem'}",
        **{"steps": 30, "eval_every_steps": 10, "learning_rate": 0.01, **SIZES, **changes},
    )
    return loop.run(settings, Text)


@pytest.fixture(scope="module")
def trained(folder):
    """A run with predicted weights and a tied array, and what it says of itself."""
    options = {"tie_embedding": True, "remedy": "recipe", "timeline": 20, "steps": 45}
    return folder / "run", train(folder, "run", **options)


def test_its_summary_and_timeline(trained):
    folder, summary = trained
    assert summary["best_validation_loss"] <= summary["validation_loss"] < 2.5
    assert summary["split"] == "validation"
    assert summary["left_out"] == [0, 0]
    numbers = json.loads((folder / "timeline.json").read_text())["otherData"]
    assert len(numbers["measured"]["utilisation"]) == 2
    assert (folder / "timeline.png").exists()


def test_a_report_shows_losses_and_bytes(trained, tmp_path):
    folder, summary = trained
    report.write([str(folder)], str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert f"{summary['validation_loss']:.4f}" in page
    assert f"{summary['bytes_per_second']:,.0f}" in page
    for text in (
        "bytes/s",
        "validation loss against time",
        "bytes per second",
        "transformer on file:",
    ):
        assert text in page
    assert "images" not in page
    images = ROOT / "results" / "compare_quick" / "backprop_k1_seed0"
    with pytest.raises(UsageError, match="backprop_k1_seed0: counts images, run bytes; give runs"):
        report.write([str(folder), str(images)], str(tmp_path / "both.html"))
    (folder / "summary.json").rename(tmp_path / "summary.json")  # as if it had been stopped
    try:
        report.write([str(folder)], str(tmp_path / "unfinished.html"))
    finally:
        (tmp_path / "summary.json").rename(folder / "summary.json")
    assert "unfinished: 45 of 45 steps seen" in (tmp_path / "unfinished.html").read_text()


def test_an_exported_model_predicts_the_held_out_text(trained, tmp_path):
    """With what is in the file alone; the true weights, and the tied array in both layers."""
    folder, summary = trained
    path = tmp_path / "model.safetensors"
    assert "transformer after step 45, " in export.export(
        str(folder), str(path), "safetensors", "last", overwrite=False
    )
    params, model_state, about = model_file.load(path)
    assert (about["experiment"], about["params_sha256"]) == ("lm", summary["params_sha256"])
    network = fdg.chain(model_file.layers(about))
    text = corpus.load(about["dataset"], 0, about["context"])
    assert bytes(about["vocabulary"]) == text.vocabulary
    x, labels = corpus.windows(text.validation, about["context"])
    logits, _ = jax.jit(lambda *v: network.apply(*v, train=False, key=None))(params, model_state, x)
    loss, metrics = Text.loss_fn(logits, labels)
    assert float(loss) == pytest.approx(summary["validation_loss"], rel=1e-4)
    assert float(metrics["error"]) == pytest.approx(summary["validation_error"], rel=1e-4)


@pytest.mark.parametrize("method", ["fdg", pytest.param("adl", marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_goes_on_to_the_bit(folder, method, monkeypatch):
    options = {
        "method": method,
        "num_stages": 3,
        "checkpoint_every_steps": 4,
        "message_dtype": "int8",
    }
    whole = train(folder, f"whole-{method}", **options)
    real = loop.fetch

    def stop(loader, step):
        if step == 18:
            raise KeyboardInterrupt
        return real(loader, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "fetch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder, f"stopped-{method}", **options)
    again = train(folder, f"stopped-{method}", **options)
    times = ("train_seconds", "bytes_per_second")
    assert {n: v for n, v in again.items() if n not in times} == {
        n: v for n, v in whole.items() if n not in times
    }


def test_another_text_or_another_program_is_refused(folder, monkeypatch):
    real = loop.fetch

    def stop(loader, step):
        if step == 6:
            raise KeyboardInterrupt
        return real(loader, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "fetch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder, "other", checkpoint_every_steps=2)
    poem = (folder / "poem").read_bytes()
    try:
        (folder / "poem").write_bytes(poem.replace(b"cat", b"rat"))
        with pytest.raises(UsageError, match="--dataset: the text is not the one"):
            train(folder, "other", checkpoint_every_steps=2)
    finally:
        (folder / "poem").write_bytes(poem)
    with pytest.raises(UsageError, match=r"it is a run of experiments\.lm"):
        resume.find(PROGRAMS["cifar"].Settings(str(folder / "other")))


def series(folder, *arguments: str) -> compare.Series:
    values = flags.FlagValues()
    PROGRAMS["lm"].define_flags(values)
    compare.define_flags(values)
    given = {name: value for name, value in SIZES.items() if name != "warmup_steps"}
    sizes = [f"--{name}={value}" for name, value in given.items()]
    values(["compare", "--program=lm", f"--dataset=file:{folder / 'poem'}", *sizes, *arguments])
    return compare.from_flags(values)


def test_methods_are_compared_on_text(folder, tmp_path):
    lists = ["--methods=backprop,fdg", "--seeds=0,1", "--reach=2.2", f"--workdir={tmp_path}"]
    found = compare.check(series(folder, *lists))
    losses = {"backprop": 1.5, "fdg": 2.25}
    commands = []

    def runner(command: list[str]) -> tuple[int, str]:
        """Writes the files of a made-up run."""
        commands.append(command)
        values = flags.FlagValues()
        PROGRAMS["lm"].define_flags(values)
        values(["lm", *command[3:]])
        config = PROGRAMS["lm"].from_flags(values)
        run = pathlib.Path(config.workdir)
        run.mkdir()
        (run / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        loss = losses[config.method] + config.seed / 10
        lines = [
            {
                "epoch": e,
                "split": "validation",
                "loss": loss + 2 - e,
                "error": 0.9,
                "seconds": 5 * e,
            }
            for e in (1, 2)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        numbers = {"validation_loss": loss, "best_validation_loss": loss, "validation_error": 0.9}
        numbers |= {"train_seconds": 10.0, "bytes_per_second": 9.0, "steps": 4}
        (run / "summary.json").write_text(json.dumps({**numbers, "params_sha256": "0"}))
        return 0, ""

    assert compare.run(found, runner) == 0
    assert [command[2] for command in commands] == ["experiments.lm"] * 4
    table = (tmp_path / "table.md").read_text()
    assert "# transformer on file:" in table
    assert "Validation loss after the last step" in table
    assert "| backprop |  | 1.550 ± 0.071 (n=2) |" in table
    assert "| fdg | 2 | 1 | not reached |" in table  # 2.3 after 10 seconds
    assert "| backprop | 1 |  | 7 |" in table  # 2.55 after 5, 1.55 after 10
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["program"] == "lm"
    assert [run["loss"] for run in results["runs"]] == [1.5, 2.25, 1.6, 2.35]
    assert results["runs"][0]["bytes_per_second"] == 9.0
    assert results["aggregates"][0]["mean_loss"] == pytest.approx(1.55)
    with pytest.raises(UsageError, match=r"--choose_beta: experiments\.lm has no data for testing"):
        compare.check(series(folder, *lists, "--choose_beta"))
    with pytest.raises(UsageError, match="--stages=9: transformer has 4 layers"):
        compare.check(series(folder, *lists, "--stages=9"))


def test_a_loss_that_is_not_finite_is_compared_as_such(folder, tmp_path):
    lists = ["--methods=fdg", "--seeds=0", f"--workdir={tmp_path}"]
    (config,) = series(folder, *lists).configs((1.0,), (0,))
    run = pathlib.Path(config.workdir)
    run.mkdir()
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    line = {"epoch": 1, "split": "validation", "loss": None, "error": 0.9, "seconds": 5}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    numbers = {"validation_loss": None, "best_validation_loss": None, "validation_error": 0.9}
    numbers |= {"train_seconds": 1.0, "bytes_per_second": 9.0, "steps": 4, "params_sha256": "0"}
    (run / "summary.json").write_text(json.dumps(numbers))
    assert finished(config).value == np.inf
    assert compare.run(series(folder, *lists), lambda command: (1, "")) == 0
    assert "| fdg | 1 | not finite |" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["runs"][0]["loss"] is None


def test_the_program_is_known_before_its_flags_are(tmp_path):
    (tmp_path / "flags.cfg").write_text("--program=lm\n--width=16\n")
    assert program_flag([f"--flagfile={tmp_path / 'flags.cfg'}"]) == "lm"
    assert program_flag(["--program=lm", "--seeds=0", "-program=cifar"]) == "cifar"
    assert program_flag(["--flagfile=/no/such/file"]) == "cifar"
    assert program_flag(["--program=magic"]) == "cifar"  # refused when it is parsed


def test_flags_that_mean_the_same_have_one_name():
    common = {field.name for field in dataclasses.fields(Config)}
    names = {
        program: {field.name for field in dataclasses.fields(module.Settings)}
        for program, module in PROGRAMS.items()
    }
    assert names["cifar"] & names["lm"] == common
    assert names["cifar"] - common == {
        *("data_dir", "train_size", "crop_padding", "flip", "dropout", "unroll", "dtype"),
        *("fast_derivatives", "lr_schedule", "lr_milestones", "lr_decay", "nesterov"),
        "decay_norms",
    }
    assert names["lm"] - common == {
        *("width", "blocks", "heads", "tie_embedding", "context", "clip_norm"),
    }
    for program, module in PROGRAMS.items():
        assert program == module.Settings.PROGRAM
        assert set(module.HELP) == names[program]
        assert TASKS[program].makes


def test_which_task_a_run_had():
    assert task_of({}) is TASKS["cifar"]  # of before there was a second
    assert task_of({"experiment": "lm"}) is Text
    assert settings_of({"experiment": "lm", "workdir": "a", "width": 8}) == Settings("a", width=8)
    with pytest.raises(ValueError, match="it is a run of 'speech'; allowed are cifar, lm"):
        task_of({"experiment": "speech"})
