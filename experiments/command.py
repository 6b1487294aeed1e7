"""A program's outside: flags in, exit status out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from experiments.errors import Stopped, UsageError


def run(main: Callable[[], None]) -> None:
    """Runs ``main`` after parsing the flags; what the user can mend is one line and status 2.

    Args:
      main: reads ``absl.flags.FLAGS``.
    """

    def parse(arguments: Sequence[str]) -> Sequence[str]:
        if any(a in ("-h", "-help", "--help") for a in arguments[1:]):
            flags.FLAGS.unparse_flags()
            print((sys.modules["__main__"].__doc__ or "").strip(), flags.FLAGS.main_module_help())
            sys.exit(0)
        try:
            rest = flags.FLAGS(arguments)
            if len(rest) > 1:
                raise UsageError(f"{rest[1]}: not a flag; flags are written --name=value")
        except (flags.Error, UsageError, OSError, UnicodeError) as error:
            fail(error)
        # JAX tells of every kind of device that it did not find; that is no news.
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        return rest

    def guarded(arguments: Sequence[str]) -> None:
        del arguments
        try:
            main()
        except UsageError as error:
            fail(error)
        except Stopped as stopped:
            print(stopped, flush=True)
            sys.exit(75)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=parse)


def fail(error: Exception) -> None:
    """Ends the program with the error's message on one line and exit status 2."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)
