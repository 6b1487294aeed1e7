"""python -m experiments.compare: what it runs, what it does not run again, and what it writes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

from experiments import compare
from experiments.common.errors import UsageError
from experiments.comparing import paper
from experiments.comparing.records import finished
from experiments.images import settings
from experiments.tasks import PROGRAMS, program_flag

ROOT = pathlib.Path(__file__).parents[2]
FLAGFILES = sorted((pathlib.Path(compare.__file__).parent / "flags").glob("compare_*.cfg"))


def parse(*arguments: str) -> compare.Series:
    values = flags.FlagValues()
    PROGRAMS[program_flag(arguments)].define_flags(values)
    compare.define_flags(values)
    assert values(["compare", *arguments]) == ["compare"]
    return compare.from_flags(values)


class Fake:
    """Writes made-up runs instead of training; ``error`` gets a run's settings."""

    def __init__(self, error=lambda config: 0.25) -> None:
        self.error = error
        self.folders: list[str] = []
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> tuple[int, str]:
        values = flags.FlagValues()
        settings.define_flags(values)
        values(["cifar", *command[3:]])
        config = settings.from_flags(values)
        folder = pathlib.Path(config.workdir)
        self.folders.append(folder.name)
        self.commands.append(command)
        error = self.error(config)
        if error is None:
            return 1, "first\n" * 20 + "the cause\n"
        write(config, error)
        return 0, ""


def write(config, error: float, summary: bool = True) -> None:
    folder = pathlib.Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    split = "validation" if config.validation_size else "test"
    points = [
        {"epoch": e, "split": split, "loss": 1.0, "error": error + (2 - e) / 10, "seconds": 5.0 * e}
        for e in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    numbers = {"train_seconds": 10.0 + config.seed, "images_per_second": 9.0, "steps": 4}
    errors = {f"{split}_error": error, f"best_{split}_error": error, f"{split}_loss": None}
    if summary:
        text = json.dumps({**errors, **numbers, "params_sha256": "0"})
        (folder / "summary.json").write_text(text)


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_order_names_and_what_is_passed_on(tmp_path):
    lists = ["--methods=backprop,ddg,fdg", "--stages=2,4", "--betas=1,0.5", "--seeds=0,3"]
    series = parse(*lists, f"--workdir={tmp_path}", "--noflip", "--learning_rate=0.05")
    fake = Fake()
    assert compare.run(series, fake) == 0
    first = ["backprop_k1", "ddg_k2", "ddg_k4", "fdg_k2_beta1", "fdg_k2_beta0.5", "fdg_k4_beta1"]
    first += ["fdg_k4_beta0.5"]
    assert fake.folders == [f"{name}_seed{seed}" for seed in (0, 3) for name in first]
    command = fake.commands[4]
    assert command[:3] == [sys.executable, "-m", "experiments.cifar"]
    given = {"--flip=false", "--learning_rate=0.05", "--beta=0.5", "--num_stages=2", "--seed=0"}
    assert given | {"--method=fdg", "--lr_milestones=150.0,225.0,275.0"} <= set(command)
    assert not any(a.startswith(("--data_dir", "--accumulate")) for a in command)


def test_remedies_are_compared_where_there_is_staleness(tmp_path):
    errors = {"none": 0.3, "recipe": 0.2}
    fake = Fake(lambda config: errors[config.remedy])
    lists = ["--methods=backprop,gpipe,fdg", "--remedies=none,recipe", "--seeds=0"]
    assert compare.run(parse(*lists, f"--workdir={tmp_path}"), fake) == 0
    folders = ["backprop_k1", "gpipe_k2", "fdg_k2_beta1", "fdg_k2_recipe_beta1"]
    assert fake.folders == [f"{name}_seed0" for name in folders]
    assert "--remedy=recipe" in fake.commands[3]
    text = (tmp_path / "table.md").read_text()
    assert "| fdg | 1 |  | 30.00 (n=1) |" in text
    assert "| fdg + recipe | 1 |  | 20.00 (n=1) |" in text
    # Evaluated after 5 and 10 seconds: 40 and 30 %, with the recipe 30 and 20 %.
    compare.run(parse(*lists, f"--workdir={tmp_path}", "--reach=35,30,10"), fake)
    text = (tmp_path / "table.md").read_text()
    assert "| fdg | 2 | 1 | 8 | 10 | not reached |" in text
    assert "| fdg + recipe | 2 | 1 | 5 | 5 | not reached |" in text
    with pytest.raises(UsageError, match="--reach=soon: give numbers, above 0 and at most 100"):
        parse("--reach=soon", f"--workdir={tmp_path}")
    with pytest.raises(UsageError, match="--remedy=all: no such choice"):
        parse("--remedies=all", f"--workdir={tmp_path}")
    with pytest.raises(UsageError, match="--remedy: is set for each run; give --remedies"):
        parse("--remedy=recipe", f"--workdir={tmp_path}")


def test_what_is_there_is_not_run_again_and_what_was_interrupted_is(tmp_path, capsys):
    series = parse("--methods=backprop,fdg", "--seeds=0,1", f"--workdir={tmp_path}")
    configs = series.configs(series.betas, series.seeds)
    write(configs[0], 0.3)
    write(configs[1], 0.3, summary=False)
    fake = Fake()
    assert compare.run(series, fake) == 0
    assert fake.folders == ["fdg_k2_beta1_seed0", "backprop_k1_seed1", "fdg_k2_beta1_seed1"]
    assert not any("--overwrite" in command for command in fake.commands)
    assert "2/4  fdg  K=2  beta=1  seed=0  test error 25.00 %  10 s" in capsys.readouterr().out
    assert compare.run(series, fake) == 0
    assert len(fake.folders) == 3
    for name in ("compare_epochs.png", "compare_seconds.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 700


def test_other_settings_are_refused_before_anything_runs(tmp_path):
    lists = ["--methods=backprop,fdg", "--seeds=0", f"--workdir={tmp_path}"]
    assert compare.run(parse(*lists), Fake()) == 0
    fake = Fake()
    changed = parse(*lists, "--learning_rate=0.2", "--seeds=0,1")
    with pytest.raises(UsageError, match=r"backprop_k1_seed0: .*learning_rate=0.1, .*=0.2"):
        compare.run(changed, fake)
    assert fake.folders == []
    # What says where things are is no setting; --overwrite gives the old runs up.
    assert compare.run(parse(*lists, "--data_dir=/elsewhere"), fake) == 0
    assert fake.folders == []
    assert compare.run(parse(*lists, "--learning_rate=0.2", "--overwrite"), fake) == 0
    assert len(fake.folders) == 2
    assert all("--overwrite" in command for command in fake.commands)


def test_table_by_hand(tmp_path):
    errors = {"backprop": [0.10, 0.12, 0.17], "fdg": [0.2, 0.2, 0.2]}
    fake = Fake(lambda config: errors[config.method][config.seed])
    arguments = ["--methods=backprop,fdg", "--seeds=0,1,2", f"--workdir={tmp_path}"]
    compare.run(parse(*arguments, "--dataset=cifar10", "--model=resnet20"), fake)
    # (10 + 12 + 17) / 3 = 13; deviations 3, 1, 4: sqrt(26 / 2) = 3.606.
    text = (tmp_path / "table.md").read_text().splitlines()
    assert "| backprop |  | 13.00 ± 3.61 (n=3) |  | 11.0 |  | 7.78 |  |" in text
    assert "| fdg | 1 |  | 20.00 ± 0.00 (n=3) |  | 11.0 |  | 7.92 |" in text
    found = results(tmp_path)
    assert found["aggregates"][0]["sd_error"] == pytest.approx(0.0360555)
    assert [r["error"] for r in found["runs"]] == [0.1, 0.2, 0.12, 0.2, 0.17, 0.2]
    curve = found["aggregates"][0]["curve"]
    assert curve[0] == pytest.approx(
        {"epoch": 1, "seconds": 5, "mean": 0.23, "min": 0.20, "max": 0.27}
    )


def test_the_papers_figures():
    assert paper.figure("cifar10", "resnet56", "fdg", 4, 1.0) == "6.83"
    assert paper.figure("tfds:cifar100", "resnet18", "ddg", 2, 1.0) == "22.74"
    assert paper.figure("cifar10", "resnet20", "fdg", 2, 0.5) == "7.23 (best of its betas, 0.2)"
    assert "another data set" in paper.figure("folder:cifar10", "resnet20", "backprop", 1, 1.0)
    assert paper.figure("cifar10", "small_resnet", "fdg", 2, 1.0) == ""
    assert paper.figure("cifar10", "resnet56", "dsp", 2, 1.0) == ""


def test_beta_is_chosen_on_held_out_images(tmp_path):
    def error(config):
        if not config.validation_size:
            return 0.5
        best = {2: 0.2, 4: 1.0}[config.num_stages]
        return 0.1 if config.beta == best else 0.1 + config.seed / 10

    lists = ["--methods=ddg,fdg", "--stages=2,4", "--betas=1,0.5,0.2", "--seeds=0,1"]
    lists += ["--choose_beta", "--choose_seeds=0,2", "--choose_validation_size=7"]
    fake = Fake(error)
    assert compare.run(parse(*lists, f"--workdir={tmp_path}"), fake) == 0
    assert fake.folders[0] == "choose_fdg_k2_beta1_seed0"
    assert all(name.startswith("choose_fdg") for name in fake.folders[:12])
    final = ["ddg_k2", "ddg_k4", "fdg_k2_beta1", "fdg_k2_beta0.2", "fdg_k4_beta1"]
    assert fake.folders[12:] == [f"{name}_seed{seed}" for seed in (0, 1) for name in final]
    assert "--validation_size=7" in fake.commands[0]
    assert "--validation_size=0" in fake.commands[12]
    choice = results(tmp_path)["beta_choice"]
    assert {key: entry["best"] for key, entry in choice.items()} == {"fdg_k2": 0.2, "fdg_k4": 1.0}
    means = choice["fdg_k2"]["mean_validation_error"]
    assert means == pytest.approx({"1": 0.2, "0.5": 0.2, "0.2": 0.1})
    text = (tmp_path / "table.md").read_text()
    assert "| fdg | 0.2 | 50.00 ± 0.00 (n=2) \\* |  |" in text
    assert "7 images held out" in text


def test_the_choice_waits_for_all_its_runs_and_ties_go_to_the_larger_beta(tmp_path):
    lists = ["--methods=fdg", "--betas=0.5,1", "--seeds=0", "--choose_beta"]
    series = parse(*lists, "--choose_validation_size=7", f"--workdir={tmp_path}")
    configs = series.choosing()
    write(configs[0], 0.1)
    records = [finished(configs[0])]
    assert paper.choose(configs, records) == {}
    write(configs[1], 0.1)
    records.append(finished(configs[1]))
    assert paper.choose(configs, records)["fdg_k2"]["best"] == 1.0


def test_a_failed_run_is_told_and_the_series_goes_on(tmp_path, capsys):
    fake = Fake(lambda config: None if config.method == "ddg" else 0.2)
    series = parse("--methods=backprop,ddg,fdg", "--seeds=0", f"--workdir={tmp_path}")
    assert compare.run(series, fake) == 1
    assert len(fake.folders) == 3
    told = capsys.readouterr()
    assert "FAILED with status 1" in told.out
    assert "the cause" in told.out
    assert told.out.count("first") < 10
    assert "ddg_k2_seed0" in told.err


def test_the_time_limit_and_report_only(tmp_path, capsys):
    lists = ["--methods=backprop,fdg", "--seeds=0", f"--workdir={tmp_path}"]
    fake = Fake()
    with pytest.raises(UsageError, match="report_only"):
        compare.run(parse(*lists, "--report_only"), fake)
    assert compare.run(parse(*lists, "--limit_minutes=1e-9"), fake) == 0
    assert fake.folders == []
    assert "2 runs remaining" in capsys.readouterr().out
    write(parse(*lists).configs((1.0,), (0,))[0], 0.2)
    assert compare.run(parse(*lists, "--report_only"), fake) == 0
    assert fake.folders == []
    assert len(results(tmp_path)["runs"]) == 1


def test_errors_on_the_validation_split_are_named_so(tmp_path):
    lists = ["--methods=fdg", "--seeds=0", "--validation_size=10", f"--workdir={tmp_path}"]
    assert compare.run(parse(*lists), Fake()) == 0
    assert "Validation error" in (tmp_path / "table.md").read_text()
    assert results(tmp_path)["aggregates"][0]["split"] == "validation"


@pytest.mark.parametrize("path", FLAGFILES, ids=lambda path: path.stem)
def test_flagfile(path):
    series = parse(f"--flagfile={path}", "--workdir=somewhere")
    assert series.configs(series.betas, series.seeds)
    text = path.read_text()
    assert path.stem in text
    assert "expected" in text
    assert text.startswith("# ")


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    cache = ROOT / ".cache" / "experiments"
    environment = {**os.environ, "FDG_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "experiments.compare", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=fdg,magic"], "--methods=magic"),
        (["--methods="], "--methods"),
        (["--stages=0"], "--stages=0"),
        (["--betas=1,0"], "--betas=1,0"),
        (["--betas=a"], "--betas=a"),
        (["--seeds=-1"], "--seeds=-1"),
        (["--method=fdg"], "--methods"),
        (["--seed=1"], "--seeds"),
        (["--limit_minutes=-1"], "--limit_minutes"),
        (["--choose_beta", "--validation_size=5"], "--choose_validation_size"),
        (["--learning_rate=0"], "--learning_rate"),
        (["--workdir="], "--workdir"),
    ],
)
def test_bad_lists_are_refused(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        parse(f"--workdir={tmp_path / 'series'}", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages=64"], "--stages=64"),
        (["--model=resnet21"], "--model"),
        (["--dataset=imagenet"], "--dataset=imagenet"),
        (["--choose_beta", "--train_size=9500"], "--choose_validation_size=1000"),
    ],
)
def test_what_does_not_fit_network_or_data_is_refused(tmp_path, arguments, message):
    series = parse(f"--workdir={tmp_path / 'series'}", *arguments)
    with pytest.raises(UsageError, match=message):
        compare.check(series)
    assert not (tmp_path / "series").exists()


@pytest.mark.slow
def test_a_real_series_of_two_runs(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for label, level in (("dark", 60), ("light", 180)):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 50, level + 50, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    out = tmp_path / "series"
    arguments = [f"--dataset=folder:{tmp_path / 'images'}", f"--workdir={out}", "--partition=2"]
    arguments += ["--batch_size=16", "--steps=4", "--seeds=0", "--crop_padding=1"]
    done = program(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(out)
    assert [r["folder"] for r in found["runs"]] == ["backprop_k1_seed0", "fdg_k2_beta1_seed0"]
    assert found["machines"][0]["versions"]["jax"]
    assert "2/2  fdg" in done.stdout
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == [
        "compare_epochs.png",
        "compare_seconds.png",
        "results.json",
        "table.md",
    ]
    # The settings are those of the runs that are there, or status 2 and one line.
    done = program(*arguments, "--momentum=0.5")
    assert done.returncode == 2
    assert "--momentum=0.9, not --momentum=0.5" in done.stderr
    assert done.stderr.count("\n") == 1
