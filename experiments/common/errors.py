"""What ends a program before its time."""


class UsageError(ValueError):
    """An error whose message is shown alone, without a traceback; the exit status is 2.

    The message is one line. It names the flag, its value, what is allowed and the remedy.
    """


class Stopped(Exception):
    """A run ended because it was asked to, and can go on; its message is shown, the status is 75.

    75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again.
    """


class Failed(Exception):
    """A run could not go on; its message is shown alone, the status is 1."""
