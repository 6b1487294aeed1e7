"""Additional writers of metrics: TensorBoard, Weights & Biases.

A writer receives every line of metrics.jsonl with its number. A resumed run sends existing lines
again, so that none is missing or duplicated, whenever the run was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from experiments.common.errors import Failed, UsageError
from experiments.common.workdir import Workdir, Writer

# Name of the writer, its folder and its extra in pyproject.toml -> module.
WRITERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}
WANDB_MODES = ("offline", "online", "disabled")
# Fields that identify a line, not quantities.
_PLACE = ("step", "split")


class TensorBoard:
    """Event files in the workdir's folder tensorboard: a curve for every quantity of a split."""

    def __init__(self, out: Workdir, config: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        del config  # it is in config.json
        folder, name = out.path / "tensorboard", identity(out)
        # They may contain lines after the checkpoint; all lines are written again.
        for path in folder.glob(f"events*.{name}"):
            path.unlink()
        self._writer = SummaryWriter(str(folder), filename_suffix=f".{name}")

    def write(self, number: int, line: dict[str, Any]) -> None:
        del number
        for tag, value in quantities(line).items():
            self._writer.add_scalar(tag, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, offline unless WANDB_MODE says otherwise."""

    def __init__(self, out: Workdir, config: dict[str, Any]) -> None:
        import wandb

        mode, name = wandb_mode(), identity(out)
        if mode == "offline":  # otherwise the server has the lines
            for path in (out.path / "wandb").glob(f"offline-run-*-{name}"):
                shutil.rmtree(path)
        try:
            self._run = wandb.init(
                project="fdg_jax",
                name=out.path.name,
                id=name,
                resume=None if mode == "offline" else "allow",
                dir=str(out.path),
                config=config,
                mode=mode,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise Failed(f"--writers=wandb: {error}") from error
        self._run.define_metric("*", step_metric="step")

    def write(self, number: int, line: dict[str, Any]) -> None:
        if number >= self._run.step:
            self._run.log({**quantities(line), "step": line["step"]}, step=number)

    def close(self) -> None:
        self._run.finish()


def quantities(line: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a line by split and name.

    Example:
      >>> quantities({"step": 3, "split": "test", "loss": None, "error": 0.25})
      {'test/error': 0.25}
    """
    return {
        f"{line['split']}/{name}": value
        for name, value in line.items()
        if name not in _PLACE and value is not None
    }


def identity(out: Workdir) -> str:
    """An identifier of the run in a workdir: the same when resumed, different for a new run."""
    born = (out.path / "config.json").stat()
    name = f"{out.path.resolve()} {born.st_ino} {born.st_mtime_ns}"
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def wandb_mode() -> str:
    """The mode in WANDB_MODE; offline by default, so that nothing is sent unasked.

    Raises:
      UsageError: unknown mode.
    """
    mode = os.environ.get("WANDB_MODE", "offline")
    if mode not in WANDB_MODES:
        raise UsageError(
            f"--writers=wandb: WANDB_MODE={mode} is not known; allowed are {', '.join(WANDB_MODES)}"
        )
    return mode


def names(text: str) -> list[str]:
    """The writers in --writers, in order."""
    return list(dict.fromkeys(text.split(","))) if text else []


def check(text: str) -> None:
    """Checks that the writers in --writers are available; writes nothing.

    Raises:
      UsageError: a writer is unknown or not installed.
    """
    for name in names(text):
        if name not in WRITERS:
            allowed = ", ".join(WRITERS)
            raise UsageError(f"--writers={text}: no writer {name!r}; allowed are {allowed}")
        if importlib.util.find_spec(WRITERS[name]) is None:
            raise UsageError(
                f"--writers={text}: {WRITERS[name]} is not installed; pip install -e .[{name}], or "
                f"leave {name} out"
            )
        if name == "wandb" and wandb_mode() == "online":
            import wandb

            if not wandb.login(prompt=False):
                raise UsageError(
                    f"--writers={text}: WANDB_MODE=online needs a key; run wandb login, or leave "
                    "WANDB_MODE out to write to the workdir"
                )


@contextlib.contextmanager
def attached(text: str, out: Workdir, config: dict[str, Any]) -> Iterator[None]:
    """Attaches writers to metrics.jsonl; existing lines are sent first.

    Args:
      text: --writers.
      out: the workdir.
      config: the description of the run.
    """
    makers: dict[str, Callable[[Workdir, dict[str, Any]], Writer]]
    makers = {"tensorboard": TensorBoard, "wandb": WandB}
    with contextlib.ExitStack() as stack:
        for name in names(text):
            writer = makers[name](out, config)
            stack.callback(writer.close)
            out.writers.append(writer)
        for number, line in enumerate(out.metrics() if out.lines else []):
            for writer in out.writers:
                writer.write(number, line)
        yield
