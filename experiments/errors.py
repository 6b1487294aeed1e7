"""The error of an invalid setting."""

from experiments.common.errors import UsageError

__all__ = ["UsageError"]
