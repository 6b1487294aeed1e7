"""For mkdocstrings: what Markdown does not know in the docstrings becomes Markdown and MathML.

They are written for Python's help and for readers of optax: reStructuredText inside, Google's
sections outside.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

MATH_BLOCK = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n?|\n)+)", re.MULTILINE)
MATH = re.compile(r":math:`([^`]+)`")
LINK = re.compile(r"`([^`<]+?)\s*<([^`>]+)>`_")


def markdown(text: str) -> str:
    """A docstring with its equations, links and example in Markdown's way.

    Args:
      text: the docstring, without the indentation of the code around it.

    Returns:
      The same in Markdown, equations as MathML.
    """

    def block(found: re.Match[str]) -> str:
        equation = " ".join(textwrap.dedent(found[2]).split())
        return f"{found[1]}{convert(equation, display='block')}\n\n"

    text = MATH_BLOCK.sub(block, text)
    text = MATH.sub(lambda found: convert(found[1]), text)
    text = LINK.sub(lambda found: f"[{' '.join(found[1].split())}]({found[2]})", text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


class Markup(griffe.Extension):
    """Rewrites every docstring before it is taken apart."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See griffe."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
