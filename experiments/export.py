"""Exports the trained model of a run to one file.

    python -m experiments.export --workdir=runs/a --output=model.safetensors

The run may be finished, stopped or active. Exports the parameters (the true weights if a remedy
predicts) and batch statistics of a checkpoint; gradients in flight are not applied. The file
contains the network without its cuts. experiments.exporting.model_file.load reads it.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import optax
from absl import flags

import fdg_jax as fdg
from experiments.common import command
from experiments.common.errors import UsageError
from experiments.common.workdir import local_path
from experiments.exporting import model_file
from experiments.tasks import settings_of, task_of
from experiments.training import family, methods, remedies, resume
from experiments.training.config import program_of
from experiments.training.loop import params_sha256
from fdg_jax.checkpoint import manifest, weights
from fdg_jax.engine.rules import stage_rule
from fdg_jax.layer import Layer
from fdg_jax.partition.layerwise import separate
from fdg_jax.tie import Tie
from fdg_jax.tied_stage import emptied, tied_stages

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", "", "Directory of the run.")
    flags.DEFINE_string("output", "", "Output file, or directory with --format=orbax.")
    flags.DEFINE_enum("format", "safetensors", model_file.FORMATS, "Output format.")
    flags.DEFINE_string(
        "checkpoint", "last", "last, best (lowest evaluated error), or the number of a step."
    )
    flags.DEFINE_bool(
        "averaged", False, "Export the average of the weights that --average_decay keeps."
    )
    flags.DEFINE_bool("overwrite", False, "Overwrite an existing output.")


def run_of(workdir: str) -> dict[str, Any]:
    """The config.json of the run in ``workdir``.

    Raises:
      UsageError: there is no run, or its config.json is too old to contain what a model needs.
    """
    if not workdir:
        raise UsageError("--workdir: is missing; name the folder of a run")
    try:
        found = json.loads((pathlib.Path(workdir).expanduser() / "config.json").read_text())
        if not isinstance(found, dict):
            raise ValueError("it is not that of a run")
        task = task_of(found)
    except (OSError, RuntimeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"--workdir={workdir}: its config.json cannot be read ({error}); name the folder of a "
            "run"
        ) from error
    missing = [n for n in (*task.makes, *task.described, "cuts") if n not in found]
    if missing:
        raise UsageError(
            f"--workdir={workdir}: its config.json, of an older version, does not say "
            f"{', '.join(missing)}; add what that of a new run on the same data says"
        )
    return found


def choose(workdir: str, checkpoint: str) -> pathlib.Path:
    """The directory of the requested checkpoint.

    Args:
      workdir: the run's directory.
      checkpoint: "last", "best" or a step.

    Raises:
      UsageError: there is no such checkpoint.
    """
    directory = pathlib.Path(workdir).expanduser() / resume.FOLDER
    steps = manifest.steps(directory)
    if not steps:
        raise UsageError(
            f"--workdir={workdir}: its run has no checkpoint; --checkpoint_every_steps takes some"
        )
    folders = {step: manifest.folder(directory, step) for step in steps}
    listed = ", ".join(map(str, steps))
    if checkpoint == "best":
        for step in sorted(steps, key=lambda step: (manifest.score(folders[step]), -step)):
            if math.isfinite(manifest.score(folders[step])) and whole(folders[step]):
                return folders[step]
        raise UsageError(
            f"--checkpoint=best: none of {listed} in {workdir} is whole and was evaluated; "
            "choose one of these"
        )
    if checkpoint == "last":
        return folders[steps[0]]
    if not checkpoint.isdecimal() or int(checkpoint) not in steps:
        raise UsageError(
            f"--checkpoint={checkpoint}: not in {workdir}; choose last, best, or one of {listed}"
        )
    return folders[int(checkpoint)]


def whole(folder: pathlib.Path) -> bool:
    """Whether a checkpoint is intact; reports damaged ones."""
    try:
        manifest.verify(folder, manifest.read(folder))
    except model_file.DAMAGE as error:
        print(f"{folder} is damaged ({error}) and passed over", file=sys.stderr)
        return False
    return True


def place(output: str, overwrite: bool) -> pathlib.Path:
    """The output path.

    Raises:
      UsageError: an invalid path, or an existing file that may not be replaced.
    """
    if not output:
        raise UsageError("--output: is missing; name the file to write")
    try:
        path = local_path(output, "--output")
        there, folder = path.exists(), path.is_dir()
        if not path.parent.is_dir():
            raise NotADirectoryError(f"there is no folder {path.parent}")
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--output={output}: cannot be written ({error}); name another") from error
    if there and not overwrite:
        raise UsageError(f"--output={output}: is there already; name another, or add --overwrite")
    if folder:  # it would be deleted with its contents
        try:
            model_file.metadata(path)
        except ValueError as error:
            raise UsageError(
                f"--output={output}: is a folder, and no exported one; name another"
            ) from error
    return path


def export(
    workdir: str,
    output: str,
    kind: str,
    checkpoint: str,
    overwrite: bool,
    averaged: bool = False,
) -> str:
    """Writes a run's model.

    Args:
      workdir, output, kind, checkpoint, overwrite, averaged: the values of the flags.

    Returns:
      A line that describes the written file.

    Raises:
      UsageError: export is not possible; nothing has been written or replaced.
    """
    path = place(output, overwrite)
    run = run_of(workdir)
    if averaged and not run.get("average_decay"):
        raise UsageError(
            f"--averaged: the run in {workdir} keeps no average of its weights; leave it out, or "
            "train with --average_decay"
        )
    folder = choose(workdir, checkpoint)
    try:
        stages, found, tie = read(run, folder, averaged)
    except model_file.DAMAGE as error:
        raise UsageError(
            f"--checkpoint={checkpoint}: {folder} cannot be read ({error}); choose another"
        ) from error
    network = fdg.chain(stages)
    arrays = model_file.named(*(separate(network, tuple(trees)) for trees in found))
    step = int(folder.name.removeprefix("step-"))
    task = task_of(run)
    about = {name: run[name] for name in (*task.described, *task.makes)}
    about |= {
        "experiment": program_of(run),
        "step": step,
        # Hash of the run's own params, which contain a tied array once.
        "averaged": averaged,
        "params_sha256": params_sha256(emptied(tied_stages(stages, tie), found.params)),
        "fdg_jax": fdg.__version__,
    }
    try:
        model_file.save(path, kind, arrays, about)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"--output={output}: cannot be written ({error}); name another") from error
    count = sum(array.size for name, array in arrays.items() if name.startswith("params/"))
    return f"{run['model']} after step {step}, {count:,} parameters: {output}"


def read(
    run: dict[str, Any], folder: pathlib.Path, averaged: bool = False
) -> tuple[Sequence[Layer], weights.Weights, Tie | None]:
    """The stages of a run, their weights from a checkpoint, and the tie."""
    task, config = task_of(run), settings_of(run)
    layers, example = model_file.layers(run), model_file.example(run, 1)
    stages = fdg.partition(layers, len(run["cuts"]) + 1, example, cost=run["cuts"])
    schedule, classes = methods.schedule(config), task.num_labels(run)
    own = family.assemble(config, schedule, stages, task.loss_fn, classes, images=task.images)
    tie = task.tied(run, layers)
    if not averaged and not remedies.predicts(run.get("remedy", "none")):
        return own.stages, weights.read(folder, own.stages, example, tie=tie), tie
    rate = optax.constant_schedule(config.learning_rate)

    def optimizer(k: int) -> fdg.StageOptimizer:
        plain = fdg.StageOptimizer.of(task.optimizer(config, rate, schedule, k))
        return stage_rule(methods.gradient(config), schedule, k).optimizer(plain)

    found = weights.read(folder, own.stages, example, optimizer, tie, averaged)
    return own.stages, found, tie


def main() -> None:
    values = (FLAGS.workdir, FLAGS.output, FLAGS.format, FLAGS.checkpoint, FLAGS.overwrite)
    print(export(*values, FLAGS.averaged))


if __name__ == "__main__":
    define_flags()
    command.run(main)
