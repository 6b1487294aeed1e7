"""Trains an image classifier with FDG or a baseline.

    python -m experiments.cifar --flagfile=experiments/flags/quickstart.cfg --workdir=runs/try

Every setting is a flag; a flagfile contains one flag per line, and later flags take precedence. A
flag that the chosen method does not use is checked but ignored, so one flagfile serves all methods.

Repeat the command to resume a run that was stopped or killed. SIGTERM and Ctrl-C end a run after a
checkpoint, with status 75; a second one ends it immediately. A failed stage or non-finite numbers
end it with status 1.
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
