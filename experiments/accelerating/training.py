"""The paper's trainings: ResNet-20 and ResNet-56 with back-propagation, FDG and DDG."""

from __future__ import annotations

import json
import pathlib
import sys
from dataclasses import dataclass
from typing import Any

from experiments.accelerating.checks import ROOT
from experiments.accelerating.piece import Piece
from experiments.data import prepared
from experiments.data.cifar import CIFAR

NETWORKS = ("resnet20", "resnet56")
# Epochs of the paper's recipe, and those after which its learning rate is reduced.
EPOCHS, MILESTONES = 300, (150, 225, 275)
BUNDLED = "fashion_mnist_small"
# Minimum time for a start, and time for an evaluation and a checkpoint at the end.
EXPECTED_SECONDS, ENDING_SECONDS = 60.0, 20.0
# Flags that replace the recipe's in a rehearsal.
TINY = (
    *("--model=small_resnet", "--partition=flops", "--steps=6", "--batch_size=16"),
    *("--train_size=96", "--validation_size=64", "--eval_every_steps=3"),
)


@dataclass(frozen=True)
class Run:
    """A method of the table.

    Attributes:
      name: name of the run's folder.
      flags: flags after those of the network's flagfile, which are for FDG with K = 2 and the
        authors' beta.
    """

    name: str
    flags: tuple[str, ...]


# The authors' code applies a gradient before the next forward.
ORDER = "--order=backward_first"
RUNS = (
    Run("backprop", ("--method=backprop", "--num_stages=1", "--partition=flops", "--beta=1")),
    Run("fdg_k2", ("--method=fdg", ORDER)),
    Run("ddg_k2", ("--method=ddg", "--beta=1")),
    Run("fdg_k4", ("--method=fdg", ORDER, "--num_stages=4", "--partition=flops")),
)


def dataset(wanted: str | None, data_dir: str | None) -> str:
    """The data set: the requested one; else CIFAR-10 if available, else the bundled images."""
    if wanted is not None:
        return wanted
    root = prepared.default_dir(data_dir)
    file = CIFAR["cifar10"].archive.file
    there = [prepared.find("cifar10", root), *(root / file, root / "downloads" / file)]
    return "cifar10" if any(path and path.exists() for path in there) else BUNDLED


def pieces(
    folder: pathlib.Path, data: str, data_dir: str | None, epochs: int, rehearse: bool
) -> list[Piece]:
    """A resumable run of experiments.cifar for each network and method.

    Args:
      folder: folder of the runs.
      data: --dataset.
      data_dir: --data_dir, or None.
      epochs: epochs of every run; the milestones of the learning rate are scaled.
      rehearse: whether to train a tiny network for a few steps instead.
    """
    milestones = ",".join(f"{epochs * epoch / EPOCHS:g}" for epoch in MILESTONES)
    common = [f"--dataset={data}", f"--epochs={epochs}", f"--lr_milestones={milestones}"]
    common += ["--checkpoint_every_steps=0", "--checkpoint_every_minutes=2", "--keep_checkpoints=1"]
    if data_dir is not None:
        common.append(f"--data_dir={data_dir}")
    found = []
    for network in NETWORKS[: 1 if rehearse else None]:
        flagfile = ROOT / "experiments" / "flags" / f"cifar10_{network}.cfg"
        for run in RUNS[: 2 if rehearse else None]:
            name = f"{network}/{run.name}"
            command = [sys.executable, "-m", "experiments.cifar", f"--flagfile={flagfile}"]
            command += [*run.flags, *common, *(TINY if rehearse else ())]
            command.append(f"--workdir={folder / name.replace('/', '_')}")
            piece = Piece(
                "training",
                f"training/{name}",
                tuple(command),
                EXPECTED_SECONDS,
                resumes=True,
                ends=ENDING_SECONDS,
            )
            found.append(piece)
    return found


def read(piece: Piece) -> dict[str, Any]:
    """The progress of a run: settings and last evaluation; empty before it has started."""
    path = pathlib.Path(piece.command[-1].partition("=")[2])
    try:
        config = json.loads((path / "config.json").read_text())
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, ValueError):
        return {}
    found = {
        name: config[name]
        for name in ("model", "method", "num_stages", "order", "beta", "dataset", "epochs", "cuts")
    }
    evaluated = [line for line in lines if line["split"] != "train"]
    errors = [line["error"] for line in evaluated if line["error"] is not None]
    last = evaluated[-1] if evaluated else {}
    speeds = [line["images_per_second"] for line in lines if line["split"] == "train"]
    found |= {
        "split": last.get("split"),
        "epoch": last.get("epoch", 0.0),
        "error": last.get("error"),
        "best_error": min(errors, default=None),
        "train_seconds": last.get("seconds"),
        "images_per_second": sorted(speeds)[len(speeds) // 2] if speeds else None,
    }
    try:
        summary = json.loads((path / "summary.json").read_text())
        found["params_sha256"] = summary["params_sha256"]
    except FileNotFoundError:
        found["params_sha256"] = None
    return found
