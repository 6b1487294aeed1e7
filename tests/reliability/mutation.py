"""Mutations of files and JSON for fuzzing, drawn by Hypothesis."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis
from hypothesis import strategies as st

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../x", "/etc/passwd", "\n", "\0", "float64", 2**31 - 1, 2**31, 10**12]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


def examples(share: float) -> hypothesis.settings:
    """Settings with a share of the profile's examples: 100 in ordinary runs, more in long ones."""
    checks = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
    number = max(1, round(share * hypothesis.settings.default.max_examples))
    return hypothesis.settings(max_examples=number, suppress_health_check=checks, deadline=None)


def changed_bytes(draw: Any, content: bytes) -> bytes:
    """A file's content, truncated, flipped, overwritten, extended, emptied, or replaced."""
    at = draw(st.integers(0, max(len(content) - 1, 0)), label="at")
    kind = draw(st.sampled_from(["flip", "write", "cut", "grow", "empty", "other"]), label="kind")
    match kind:
        case "flip" if content:
            bit = 1 << draw(st.integers(0, 7))
            return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        case "write":
            some = draw(st.binary(min_size=1, max_size=16))
            return content[:at] + some + content[at + len(some) :]
        case "cut":
            return content[:at]
        case "grow":
            return content[:at] + draw(st.binary(min_size=1, max_size=64)) + content[at:]
        case "other":
            return draw(st.binary(max_size=200))
    return b""


def changed_json(draw: Any, value: Any) -> Any:
    """A JSON value with one part removed or replaced."""
    value = copy.deepcopy(value)
    holder, part = None, value
    while isinstance(part, dict | list) and part and (holder is None or draw(st.booleans())):
        keys = sorted(part) if isinstance(part, dict) else range(len(part))
        holder, key = part, draw(st.sampled_from(keys), label="key")
        part = holder[key]
    if holder is None:
        return draw(ANY_JSON)
    if draw(st.integers(0, 4)) == 0:
        del holder[key]
    else:
        holder[key] = draw(ANY_JSON, label="instead")
    return value


def one_line(error: Exception, names: object = "") -> None:
    """Checks that an error contains ``names`` and has a reasonable length."""
    assert str(names) in str(error)
    assert 10 < len(" ".join(str(error).split())) < 2000
