"""The settings and task of each program."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from absl import flags

from experiments.images import settings as cifar
from experiments.images.task import Images
from experiments.text import settings as lm
from experiments.text.task import Text
from experiments.training.config import Config, program_of
from experiments.training.task import Task

TASKS: dict[str, type[Task[Any]]] = {"cifar": Images, "lm": Text}
# The module of settings and flags of each program.
PROGRAMS: dict[str, ModuleType] = {"cifar": cifar, "lm": lm}


def task_of(described: Mapping[str, Any]) -> type[Task[Any]]:
    """The task of the run described by a config.json.

    Raises:
      ValueError: unknown program.
    """
    name = program_of(described)
    if name not in TASKS:
        raise ValueError(f"it is a run of {name!r}; allowed are {', '.join(TASKS)}")
    return TASKS[name]


def settings_of(described: Mapping[str, Any]) -> Config:
    """The settings of the run described by a config.json, with defaults for missing values.

    Raises:
      ValueError: unknown program.
    """
    task_of(described)
    kind = PROGRAMS[program_of(described)].Settings
    names = {field.name for field in dataclasses.fields(kind)}
    config: Config = kind(**{name: described[name] for name in names & described.keys()})
    return config


def program_flag(arguments: Sequence[str]) -> str:
    """The value of --program, read before the flags, which depend on it, are defined."""
    values, given = flags.FlagValues(), list(arguments)
    flags.DEFINE_list("flagfile", [], "", flag_values=values)
    # Errors in a flagfile are reported when the flags are parsed.
    with contextlib.suppress(flags.Error, OSError, UnicodeError):
        given = values.read_flags_from_files(given)
    found = [re.fullmatch(r"--?program=(.*)", argument) for argument in given]
    return next((match[1] for match in reversed(found) if match and match[1] in TASKS), "cifar")
