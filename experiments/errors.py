"""The error of a setting that is not allowed, by the path that scripts know."""

from experiments.common.errors import UsageError

__all__ = ["UsageError"]
