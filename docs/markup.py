"""Griffe extension for mkdocstrings: converts docstrings to Markdown and MathML.

The docstrings follow optax: Google's sections, and reStructuredText for equations and links.
"""

from __future__ import annotations

import pathlib
import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

MATH_BLOCK = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n?|\n)+)", re.MULTILINE)
MATH = re.compile(r":math:`([^`]+)`")
NAME = re.compile(r"(?<!`)`(fdg_jax\.[\w.]+)`(?!`)")
# What the reference documents, one directive a name.
DOCUMENTED = [
    line.removeprefix("::: ")
    for page in sorted((pathlib.Path(__file__).parent / "api").glob("*.md"))
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.startswith("::: ")
]
LINK = re.compile(r"`([^`<]+?)\s*<([^`>]+)>`_")


def markdown(text: str) -> str:
    """A docstring as Markdown: equations, links, names of the library, examples.

    Args:
      text: the docstring, without the indentation of the code around it.

    Returns:
      The text as Markdown. Equations are MathML; names of the library link to the reference.
    """

    def block(found: re.Match[str]) -> str:
        equation = " ".join(textwrap.dedent(found[2]).split())
        return f"{found[1]}<div class='equation'>{convert(equation, display='block')}</div>\n\n"

    text = MATH_BLOCK.sub(block, text)
    text = MATH.sub(lambda found: convert(found[1]), text)
    text = LINK.sub(lambda found: f"[{' '.join(found[1].split())}]({found[2]})", text)
    text = NAME.sub(lambda found: linked(found[1]), text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def linked(name: str) -> str:
    """A public name as a link to the reference; as code where it is not documented.

    Args:
      name: as users import it, such as "fdg_jax.repeat", which is documented as
        "fdg_jax.repeat.repeat".

    Returns:
      Markdown.
    """
    module, _, last = name.rpartition(".")
    pattern = re.compile(rf"{re.escape(module)}\.([a-z_]+\.)*{re.escape(last)}")
    place = next((path for path in DOCUMENTED if pattern.fullmatch(path)), None)
    return f"[`{name}`][{place}]" if place else f"`{name}`"


class Markup(griffe.Extension):
    """Converts every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See griffe."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
