"""Trains a small decoder-only transformer on the bytes of a text, with FDG or a baseline.

    python -m experiments.lm --flagfile=experiments/flags/lm_quick.cfg --workdir=runs/lm

The text is a file (--dataset=file:PATH), or the installed documentation of Python's standard
library. Its end is held out; the loss on it, in nats per byte, is the result. Every setting is a
flag; a flag that the chosen method does not use is checked but ignored.

Each stage has its own AdamW or Muon, after clipping by the stage's gradient norm; --beta shrinks
its updates, since a factor on the gradient would cancel.

The loop is that of experiments.cifar: repeat the command to resume a run that was stopped or
killed; SIGTERM and Ctrl-C end a run after a checkpoint, with status 75; experiments.launch starts
several processes.
"""

from __future__ import annotations

from experiments.common import command
from experiments.text.settings import define_flags, from_flags
from experiments.text.task import Text
from experiments.training import cluster, loop


def main() -> None:
    settings = from_flags()
    settings.check()
    cluster.join(settings)
    loop.run(settings, Text)


if __name__ == "__main__":
    define_flags()
    cluster.define_flags()
    command.run(main)
