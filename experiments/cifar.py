"""Trains an image classifier with FDG or a baseline.

    python -m experiments.cifar --flagfile=experiments/flags/quickstart.cfg --workdir=runs/try

Every setting is a flag; a flagfile holds flags, one a line, and later flags win. A flag that the
chosen method does not use is checked but ignored, so that one flagfile serves every method.

The same command again goes on with a run that was stopped or killed. SIGTERM and Ctrl-C end a run
after a checkpoint, with status 75; a second one ends it at once. A stage that fails, or numbers
that are not finite, end it with status 1.
"""

from __future__ import annotations

from experiments.common import command
from experiments.images.settings import define_flags, from_flags
from experiments.images.task import Images
from experiments.training import cluster, loop


def main() -> None:
    settings = from_flags()
    settings.check()
    cluster.join(settings)
    loop.run(settings, Images)


if __name__ == "__main__":
    define_flags()
    cluster.define_flags()
    command.run(main)
