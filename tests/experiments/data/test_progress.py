"""Progress on stderr."""

import io
import sys

import pytest

from experiments.data.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("decoding", 3_000) as advance:
        for _ in range(3):
            advance(1_000)
    assert capsys.readouterr() == ("", "decoding: 3,000\n")


@pytest.mark.parametrize("total", [10, None])
def test_bar_on_a_terminal(total: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("decoding", total) as advance:
        advance(10)
    assert "decoding" in terminal.getvalue()
    assert "10" in terminal.getvalue()
