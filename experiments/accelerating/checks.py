"""The tests of a machine: the oracle's, some of the engine's, and a short run of every program."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

from experiments.accelerating.piece import Piece

ROOT = pathlib.Path(__file__).parents[2]
ORACLE = ("tests/test_reference.py",)
ENGINE = ("tests/engine/test_compiled_tick.py", "tests/engine/test_pipeline.py")
# A short test for rehearsals.
SHORT = ("tests/test_reference.py::test_the_oracle_itself_on_a_network_solved_by_hand",)
PYTEST_SECONDS, SMOKE_SECONDS = 240.0, 40.0
ON_CPU = {"JAX_PLATFORMS": "cpu"}
# Empty: JAX's default device, instead of the tests' CPU; compiled as in a training.
ON_DEVICE = {"JAX_PLATFORMS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
PROGRAMS = (
    *("cifar", "lm", "benchmark", "compare", "staleness", "advise", "drift", "simulate"),
    *("scaling", "profile", "two_processes", "launch", "report", "export"),
)
# These need several devices, or XLA's names of operations on CPU.
CPU_PROGRAMS = ("profile", "two_processes", "launch")


def pieces(folder: pathlib.Path, platform: str, rehearse: bool) -> list[Piece]:
    """Tests with pytest, if their folder exists, and a piece for each program.

    Args:
      folder: output folder of the programs.
      platform: platform of JAX's default devices: "cpu", "gpu", "tpu".
      rehearse: whether one short test replaces all.
    """
    found = []
    if (ROOT / "tests").is_dir():
        if rehearse:
            found.append(_pytest("oracle", SHORT, ON_CPU))
        else:
            found += [_pytest("oracle", ORACLE, ON_CPU), _pytest("engine", ENGINE, ON_CPU)]
        if platform != "cpu":
            # Some tests of the engine need four devices, so they run on CPU.
            chosen = SHORT if rehearse else ORACLE
            found.append(_pytest(f"oracle_{platform}", chosen, ON_DEVICE))
    return found + smoke(folder)


def smoke(folder: pathlib.Path) -> list[Piece]:
    """A few steps of every program; report and export use the run of cifar."""
    options = commands(folder)
    found = []
    for name in PROGRAMS:
        environment = ON_CPU if name in CPU_PROGRAMS else {}
        command = (sys.executable, "-m", f"experiments.{name}", *options[name])
        piece = Piece("tests", f"tests/{name}", command, SMOKE_SECONDS, "tests", environment)
        found.append(dataclasses.replace(piece, clears=folder / name))
    return found


def commands(folder: pathlib.Path) -> dict[str, list[str]]:
    """The flags of every program, by its name."""
    sizes = ["--batch_size=4", "--image_size=8"]
    small = ["--model=small_resnet", *sizes]
    images = ["--dataset=fashion_mnist_small", "--model=small_resnet", "--train_size=64"]
    images += ["--validation_size=64", "--batch_size=16", "--steps=6", "--partition=flops"]
    images += ["--crop_padding=0", "--eval_every_steps=3", "--log_every_steps=2"]
    text = f"--dataset=file:{ROOT / 'README.md'}"
    study = ROOT / "experiments" / "flags" / "staleness_smoke.toml"
    tokens = ["--steps=8", "--warmup_steps=1", "--eval_every_steps=4", "--partition=flops", text]
    tokens += ["--batch_size=2", "--width=8", "--blocks=1", "--heads=2", "--context=8"]
    tokens += ["--num_stages=2", "--validation_size=500"]
    timed = ["--num_stages=1", "--partition=flops", "--contenders=backprop,one_device_k2"]
    timed += ["--rounds=1", "--steps=2", "--max_load=1000"]
    drift = ["--learning_rates=0.01", "--num_stages=3", "--blocks=2", "--steps=8", "--last=2"]
    processes = ["--rounds=1", "--steps=2", "--max_load=1000"]
    cifar = [sys.executable, "-m", "experiments.cifar"]
    run = folder / "cifar"

    def into(name: str) -> str:
        return f"--workdir={folder / name}"

    return {
        "cifar": [*images, "--num_stages=2", "--checkpoint_every_steps=3", into("cifar")],
        "lm": [*tokens, into("lm")],
        "benchmark": [*small, *timed, into("benchmark")],
        "compare": [
            *images,
            "--methods=backprop,fdg",
            "--stages=2",
            "--seeds=0",
            into("compare"),
        ],
        "staleness": [f"--study={study}", f"--extra={text}", into("staleness")],
        "advise": [*small, "--num_stages=1", "--seconds=0.1", "--max_load=1000", into("advise")],
        "drift": [*drift, "--batch_size=4", into("drift")],
        "simulate": ["--stages=2", into("simulate")],
        "scaling": ["--devices=8", "--stages=1,2"],
        "profile": [*small, "--steps=1", into("profile")],
        "two_processes": [*small, *processes],
        "launch": ["--num_processes=2", "--", *cifar, *images, "--num_stages=2", into("launch")],
        "report": [str(run), f"--output={folder / 'report.html'}"],
        "export": [f"--workdir={run}", f"--output={folder / 'model.safetensors'}"],
    }


def _pytest(name: str, files: tuple[str, ...], environment: dict[str, str]) -> Piece:
    options = ("-m", "not slow", "-p", "no:cacheprovider", "--durations=0", "--durations-min=60")
    command = (sys.executable, "-m", "pytest", *options, *files)
    seconds = SMOKE_SECONDS if files == SHORT else PYTEST_SECONDS
    return Piece(
        "tests", f"tests/{name}", command, seconds, f"pytest/{len(files)}", environment, ROOT
    )
