"""MkDocs hook: the documents at the root of the repository become pages of the site.

Links are written as they work in the repository. Those between documents are adapted to the site;
links to source files keep their text alone.
"""

from __future__ import annotations

import os
import pathlib
import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = ("EXPERIMENTS.md", "BENCHMARKS.md", "RELIABILITY.md", "BUILD.md")
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)]*)?\)")


def pictures(text: str) -> set[str]:
    """The pictures of a page, as its links name them."""
    return {found["target"] for found in LINK.finditer(text) if found["picture"]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents and their pictures."""
    for document in DOCUMENTS:
        path = ROOT / document
        files.append(File.generated(config, document, abs_src_path=str(path)))
        for picture in pictures(path.read_text(encoding="utf-8")):
            files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Adapts the links of a page."""
    source = page.file.src_uri
    folder = posixpath.dirname(source if source in DOCUMENTS else f"docs/{source}")

    def adapted(found: re.Match[str]) -> str:
        target = found["target"]
        if not target or "://" in target:
            return found[0]
        place = posixpath.normpath(posixpath.join(folder, target)).removeprefix("docs/")
        if files.get_file_from_path(place) is None:
            return found["text"]
        target = os.path.relpath(place, posixpath.dirname(source) or ".")
        return f"{found['picture']}[{found['text']}]({target}{found['anchor'] or ''})"

    return LINK.sub(adapted, markdown)
