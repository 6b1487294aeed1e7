"""Flags from a dataclass of settings, one per field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

DEFINE: Mapping[str, Callable[..., Any]] = {
    "str": flags.DEFINE_string,
    "str | None": flags.DEFINE_string,
    "int": flags.DEFINE_integer,
    "int | None": flags.DEFINE_integer,
    "float | None": flags.DEFINE_float,
    "float": flags.DEFINE_float,
    "bool": flags.DEFINE_bool,
    "tuple[str, ...]": flags.DEFINE_list,
    "tuple[float, ...]": flags.DEFINE_list,
}


def define(settings: type, texts: Mapping[str, str], values: flags.FlagValues) -> None:
    """Defines the flags, each with its field's default; a field without one has "".

    Args:
      settings: a dataclass.
      texts: help text of each flag, by the field's name.
      values: the flags are defined in it.
    """
    for field in dataclasses.fields(settings):
        default: Any = "" if field.default is dataclasses.MISSING else field.default
        if isinstance(default, tuple):
            default = [value if isinstance(value, str) else f"{value:g}" for value in default]
        DEFINE[str(field.type)](field.name, default, texts[field.name], flag_values=values)


def given(settings: type, parsed: flags.FlagValues) -> dict[str, Any]:
    """Values of the flags by the field's name; a tuple as the list of its parts as text."""
    return {field.name: parsed[field.name].value for field in dataclasses.fields(settings)}
