"""Errors that end a program."""


class UsageError(ValueError):
    """An error whose message is shown alone, without a traceback; the exit status is 2.

    The message is one line. It names the flag, its value, what is allowed and the remedy.
    """


class Stopped(Exception):
    """A run was stopped on request and can be resumed; exit status 75.

    75 is EX_TEMPFAIL of sysexits.h: no error, repeat the command.
    """


class Failed(Exception):
    """A run failed; its message is printed without a traceback; exit status 1."""
