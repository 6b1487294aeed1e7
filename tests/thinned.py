"""Combinations of parameters, most of which are left to `make test-slow`."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def thinned(*axes: Iterable[Any], keep: int = 5) -> list[Any]:
    """All combinations for `pytest.mark.parametrize`; one in ``keep`` is fast, the others are slow.

    Every value of an axis is among the fast ones where another has at least ``keep`` values. The
    tuples of a single axis are combinations already.
    """
    cases = []
    for numbered in itertools.product(*map(enumerate, axes)):
        slow = sum(i for i, _ in numbered) % keep != 0
        marks = [pytest.mark.slow] if slow else []
        values = [value for _, value in numbered]
        if len(axes) == 1 and isinstance(values[0], tuple):
            (values,) = values
        cases.append(pytest.param(*values, marks=marks))
    return cases
