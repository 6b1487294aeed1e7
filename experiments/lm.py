"""Trains a small decoder-only transformer on the bytes of a text, with FDG or a baseline.

    python -m experiments.lm --flagfile=experiments/flags/lm_quick.cfg --workdir=runs/lm

The text is a file (--dataset=file:PATH), or the documentation of Python's standard library as it is
installed. Its end is held out; the loss on it, in nats per byte, is the result. Every setting is a
flag; a flag that the chosen method does not use is checked but ignored.

Each stage has an AdamW or Muon of its own, after clipping by the stage's own gradient norm; --beta
shrinks what it gives, since a factor before it would cancel.

The loop is that of experiments.cifar: the same command again goes on with a run that was stopped or
killed, SIGTERM and Ctrl-C end one after a checkpoint, with status 75, and experiments.launch starts
it in several processes.
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
