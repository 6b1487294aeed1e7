"""Combinations of parameters, most of them only in `make test-slow`."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def thinned(*axes: Iterable[Any], keep: int = 5) -> list[Any]:
    """All combinations for `pytest.mark.parametrize`; one in ``keep`` is fast, the others are slow.

    Every value of an axis is among the fast ones if another axis has at least ``keep`` values.
    """
    cases = []
    for numbered in itertools.product(*map(enumerate, axes)):
        slow = sum(i for i, _ in numbered) % keep != 0
        marks = [pytest.mark.slow] if slow else []
        cases.append(pytest.param(*(value for _, value in numbered), marks=marks))
    return cases
