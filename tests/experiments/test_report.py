"""python -m experiments.report: one page that needs nothing else, and what it refuses."""

import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from experiments import report
from experiments.common.errors import UsageError
from experiments.reporting import runs

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "results" / "compare_quick"


class Page(html.parser.HTMLParser):
    """The texts of a page by element, and everything that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "img", "path", "use"):
            self.open.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "srcset", "action")]
        self.loaded += [v for n, v in attrs if n.endswith("href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


@pytest.fixture
def folders(tmp_path) -> list[pathlib.Path]:
    """A finished run of backprop, a watched one of FDG, one of DDG that was stopped."""
    made = []
    for name in ("backprop_k1_seed0", "fdg_k2_beta1_seed0", "ddg_k2_seed0"):
        shutil.copytree(RESULTS / name, tmp_path / name)
        made.append(tmp_path / name)
    one = {"batches_per_second": 3.5, "utilisation": [0.75, 1.0], "at_once": [0, 0.25, 0.75]}
    figures = {"schedule": "fdg", "stages": 2, "measured": one, "simulated": one}
    (made[1] / "timeline.json").write_text(json.dumps({"traceEvents": [], "otherData": figures}))
    (made[1] / "timeline.png").write_bytes(runs.PNG + b"\0\0\0\rIHDR\0\0\x04\0\0\0\x02\0")
    (made[2] / "summary.json").unlink()
    lines = (made[2] / "metrics.jsonl").read_text().splitlines(keepends=True)
    # Killed in the middle of a line.
    (made[2] / "metrics.jsonl").write_text("".join(lines[:8]) + '{"step": 1')
    return made


def made(folders, tmp_path) -> str:
    report.write([str(folder) for folder in folders], str(tmp_path / "page.html"))
    return (tmp_path / "page.html").read_text()


def test_a_page_of_three_runs(folders, tmp_path):
    text = made(folders, tmp_path)
    page = Page(text)
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    assert len(page.loaded) == 1
    assert not re.search(r"<script|<link|@import|url\((?!#)", text)
    assert page.texts["h1"] == ["3 runs, compared with the first"]
    assert page.texts["h2"] == [folder.name for folder in folders]
    cells = page.texts["td"]
    first = json.loads((folders[0] / "summary.json").read_text())
    second = json.loads((folders[1] / "summary.json").read_text())
    assert f"{100 * second['test_error']:.2f} %" in cells
    assert f"{second['images_per_second'] / first['images_per_second']:.2f}" in cells
    assert {"75 %, 100 %", "75 %", "finished", "unfinished", "2, 0"} <= set(cells)
    assert "   2 | F2 B0 U   F1 B1 U" in "".join(page.texts["pre"])
    last = json.loads((folders[2] / "metrics.jsonl").read_text().splitlines()[7])
    assert f"unfinished: {last['step']} of 300 steps seen" in page.texts["p"]
    assert {"Settings, versions, machine"} == set(page.texts["summary"])
    # Four plots of a line for each run; the same colours stand in the table.
    assert len(page.texts["figcaption"]) == 4
    assert all(text.count(colour) > 4 for colour in ("#d55e00", "#0072b2", "#009e73"))
    assert "prefers-color-scheme: dark" in text
    assert made(folders, tmp_path) == text


def test_every_text_is_escaped(folders, tmp_path):
    odd = folders[0].with_name("a<b>&'\"<script>alert(1)<")
    folders[0].rename(odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "dataset": "folder:<img src=x>&amp;"}))
    text = made([odd], tmp_path)
    assert "<script" not in text
    assert "<img" not in text
    page = Page(text)
    assert page.texts["h2"] == [odd.name]
    assert any("folder:<img src=x>&amp;" in cell for cell in page.texts["td"])


def test_runs_of_the_same_name_are_called_by_their_paths(folders, tmp_path):
    twin = tmp_path / "other" / folders[0].name
    shutil.copytree(folders[0], twin)
    page = Page(made([folders[0], twin], tmp_path))
    assert page.texts["h2"] == [str(folders[0]), str(twin)]


def test_a_run_that_has_logged_nothing_yet(folders, tmp_path):
    (folders[0] / "summary.json").unlink()
    (folders[0] / "metrics.jsonl").unlink()
    page = Page(made(folders[:1], tmp_path))
    assert "unfinished: 0 of 300 steps seen" in page.texts["p"]


DAMAGE = {
    "config.json": [b"{", b"[]", b'{"method": "fdg"}', b"\xff\xfe"],
    "metrics.jsonl": [b"nonsense\n", b'{"step": 1}\n', b"[]\n"],
    "summary.json": [b"", b"[1]", b'{"steps": 3}'],
    "timeline.json": [b"null", b"{}", b'{"otherData": {}}'],
    "timeline.png": [b"GIF89a"],
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_file_is_named_and_nothing_written(file, folders, tmp_path):
    for content in DAMAGE[file]:
        (folders[1] / file).write_bytes(content)
        with pytest.raises(UsageError, match=f"{file} cannot be read .* or leave the run out"):
            made(folders, tmp_path)
    assert not list(tmp_path.glob("*page*"))


def test_what_is_refused(folders, tmp_path):
    one, page = [str(folders[0])], str(tmp_path / "page.html")
    for arguments, output, message in (
        ([], page, "WORKDIR: is missing"),
        ([str(tmp_path)], page, r"holds no run \(there is no config.json\)"),
        (one, str(tmp_path / "page.txt"), "must end in .html"),
        (one, str(tmp_path / "no" / "page.html"), r"cannot be written \(No such file"),
    ):
        with pytest.raises(UsageError, match=message):
            report.write(arguments, output)


def test_the_program_takes_folders_and_ends_with_status_two(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.report", str(tmp_path), "--output=page.html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}: holds no run")
