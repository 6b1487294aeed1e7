"""Command-line handling: flags and exit status."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TextIO

import jax
from absl import app, flags, logging

from experiments.common.errors import Failed, Stopped, UsageError
from fdg_jax import distributed


def run(main: Callable[..., None], takes: str = "") -> None:
    """Parses the flags and runs ``main``; usage errors print one line and exit with status 2.

    Args:
      main: reads ``absl.flags.FLAGS``.
      takes: a description of the arguments that are not flags, passed to ``main`` as a list.
        Empty: none are allowed.
    """

    def parse(arguments: Sequence[str]) -> Sequence[str]:
        if any(a in ("-h", "-help", "--help") for a in arguments[1:]):
            adopt()
            flags.FLAGS.unparse_flags()
            print((sys.modules["__main__"].__doc__ or "").strip(), flags.FLAGS.main_module_help())
            sys.exit(0)
        try:
            rest = flags.FLAGS(arguments)
            if len(rest) > 1 and not takes:
                raise UsageError(f"{rest[1]}: not a flag; flags are written --name=value")
        except (flags.Error, UsageError, OSError, UnicodeError) as error:
            fail(error)
        # JAX logs every kind of device that it did not find; this is not of interest.
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        return rest

    def guarded(arguments: Sequence[str]) -> None:
        warnings.showwarning = one_line
        try:
            main(*([list(arguments[1:])] if takes else []))
        except UsageError as error:
            fail(error)
        except Stopped as stopped:
            print(stopped, flush=True)
            distributed.leave(distributed.PAUSED)
        except Failed as failed:
            distributed.settle()
            logging.info("what the error came from", exc_info=failed.__cause__)
            fail(failed, 1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            distributed.leave(130)
        except Exception:
            if not jax.distributed.is_initialized():
                raise
            distributed.settle()
            traceback.print_exc()
            distributed.leave(1)

    app.run(guarded, flags_parser=parse)


def adopt() -> None:
    """Makes all flags of the experiments key flags of this program, for --help."""
    defined = flags.FLAGS.flags_by_module_dict()
    for module in [name for name in defined if name.startswith("experiments.")]:
        for flag in defined[module]:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning without its source location."""
    print("warning: " + " ".join(str(message).split()), file=file or sys.stderr, flush=True)


def fail(error: Exception, status: int = 2) -> None:
    """Ends the program with the error's message on one line."""
    message = " ".join(str(error).split()).removeprefix("ERROR:: ")
    print(f"error: {message}", file=sys.stderr)
    distributed.leave(status)
