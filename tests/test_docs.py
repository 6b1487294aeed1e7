"""The pages: their code runs, links and pictures exist, and the reference is complete."""

import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

from tests import pages

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = sorted(ROOT.glob("*.md"))
# Of links and pictures, the target and the anchor.
TARGET = re.compile(r"\]\(([^)#\s]*)(?:#([\w.-]*))?\)")
# Packages whose __all__ is public.
PACKAGES = (
    *("fdg_jax", "fdg_jax.analysis", "fdg_jax.checkpoint", "fdg_jax.distributed", "fdg_jax.engine"),
    *("fdg_jax.models", "fdg_jax.optim", "fdg_jax.partition", "fdg_jax.schedule"),
)


def test_the_code_of_the_pages_runs(tmp_path, monkeypatch):
    """In a process of its own: two devices and float32, as a reader has them."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    written = [str(page) for page in PAGES if pages.blocks(page.read_text(encoding="utf-8"))]
    assert len(written) >= 8
    options = "-W", "error", "-W", "ignore:devices:UserWarning"  # pages with three stages mean it
    command = [sys.executable, *options, "-m", "tests.pages", str(ROOT / "README.md")]
    done = subprocess.run(  # killed at its deadline
        [*command, *written], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_does_not_run_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\none = 1\n```\n\n```python\n>>> one + 1\n3\n\n```\n")
    assert pages.run(page) == 1
    page.write_text("```text\nnot code\n```\n\n```python\nassert one == 1\n```\n")
    with pytest.raises(NameError) as caught:
        pages.run(page)
    assert caught.traceback[-1].lineno == 5  # counted from 0: the line in the page


@pytest.mark.parametrize("page", [*DOCUMENTS, *PAGES], ids=lambda page: page.stem)
def test_links_and_pictures_are_there(page):
    for target, anchor in TARGET.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def anchors(page: pathlib.Path) -> set[str]:
    """Those of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_reference_has_every_public_name_once():
    documented = [named(path) for path in directives()]
    assert len({id(each) for each in documented}) == len(documented)
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            public = getattr(package, name)
            if inspect.isfunction(public) or inspect.isclass(public):
                assert any(public is each for each in documented), f"{package.__name__}.{name}"


def directives() -> list[str]:
    """What the pages of the reference ask mkdocstrings for."""
    pages = sorted((DOCS / "api").glob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return re.findall(r"^::: (\S+)$", text, re.MULTILINE)


def named(path: str) -> object:
    """What a directive documents: a module, or a member of one."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    return importlib.import_module(path) if found is None else found


def test_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert str(page.relative_to(DOCS)) in navigation


def test_pictures_are_drawn(tmp_path):
    from docs import pictures

    pictures.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in pictures.FOLDER.iterdir()}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
