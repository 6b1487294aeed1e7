"""Runs the Python blocks of Markdown pages from top to bottom.

python -m tests.pages PAGE...

The blocks of a page share their names. Those with prompts are doctests.
"""

from __future__ import annotations

import doctest
import pathlib
import re
import sys
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of lines before it."""
    return [(text[: found.start(1)].count("\n"), found[1]) for found in BLOCK.finditer(text)]


def run(path: pathlib.Path) -> int:
    """Runs a page; returns the number of failed examples. Errors outside doctests are raised."""
    names: dict[str, Any] = {"__name__": "__main__"}
    runner = doctest.DocTestRunner()
    for line, code in blocks(path.read_text(encoding="utf-8")):
        if code.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code, names, path.name, str(path), line)
            test.globs = names  # not a copy, so that later blocks see the names of this one
            runner.run(test, clear_globs=False)
        else:
            exec(compile("\n" * line + code, str(path), "exec"), names)
    return runner.failures


if __name__ == "__main__":
    failed = {name: run(pathlib.Path(name)) for name in sys.argv[1:]}
    print("\n".join(f"{name}: {count} examples failed" for name, count in failed.items() if count))
    sys.exit(any(failed.values()))
