"""The error a user can mend."""


class UsageError(ValueError):
    """An error whose message is shown alone, without a traceback; the exit status is 2.

    The message is one line. It names the flag, its value, what is allowed and the remedy.
    """
