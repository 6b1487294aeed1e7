"""Self-contained HTML pages: style, tables, pictures; all text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Colour-blind-safe colours (Okabe and Ito), for light and dark backgrounds.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "6 3", "2 2", "8 2 2 2")
# Placeholder in drawings for the colour of the page's text.
_INK = "#010203"

STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --soft: #f4f6f8; --quiet: #5a6470;
  --text: #1b1f24; --back: #ffffff; --mark: #9a5b00; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a424c; --soft: #1d2228; --quiet: #a3adb8; --text: #e6e9ed; --back: #14181c;
    --mark: #f0b45a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; }
.quiet { color: var(--quiet); }
.mark { color: var(--mark); font-weight: 600; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; }
th { background: var(--soft); font-weight: 600; }
tr + tr td { border-top: 1px solid var(--line); }
.left { text-align: left; }
.swatch { width: 1.6rem; height: .7rem; vertical-align: baseline; margin-right: .4rem; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: .2rem; }
.plots svg { width: 100%; height: auto; display: block; }
pre { margin: 0; padding: .7rem; font: 13px/1.45 ui-monospace, monospace; overflow-wrap: normal; }
.picture { background: #ffffff; padding: .4rem; }
.picture img { display: block; width: 100%; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .4rem; }
@media (max-width: 40rem) { body { padding: .7rem; } th, td { padding: .3rem .5rem; } }
"""  # noqa: E501


def whole(title: str, body: Sequence[str]) -> str:
    """The page."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )


def text(tag: str, content: str, kind: str = "") -> str:
    """An element that contains only text."""
    named = f' class="{kind}"' if kind else ""
    return f"<{tag}{named}>{escape(content)}</{tag}>"


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[int] = (0,),
    swatches: bool = False,
) -> str:
    """A table in its own scrollable box.

    Args:
      heads: heads of the columns.
      rows: the cells' texts.
      left: left-aligned columns.
      swatches: whether row i begins with a sample of line i in the plots.

    Returns:
      HTML.
    """

    def cells(tag: str, values: Sequence[str], before: str = "") -> str:
        found = []
        for i, value in enumerate(values):
            kind = ' class="left"' if i in left else ""
            found.append(f"<{tag}{kind}>{before if i == 0 else ''}{escape(value)}</{tag}>")
        return f"<tr>{''.join(found)}</tr>"

    body = [cells("td", row, swatch(i) if swatches else "") for i, row in enumerate(rows)]
    return f'<div class="box"><table>{cells("th", heads)}{"".join(body)}</table></div>'


def look(i: int) -> tuple[str, str]:
    """Colour and dashes of line i."""
    return COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]


def swatch(i: int) -> str:
    """A sample of line i."""
    colour, dashes = look(i)
    return (
        '<svg class="swatch" viewBox="0 0 32 8" aria-hidden="true"><path d="M0 4H32" '
        f'stroke="{colour}" stroke-width="4" stroke-dasharray="{dashes}"/></svg>'
    )


def plot(
    title: str,
    x: str,
    lines: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    points: bool = False,
    from_zero: bool = True,
) -> str:
    """A figure of lines in the colours of the page; see `look`.

    Args:
      title: its title, which names the vertical axis.
      x: label of the horizontal axis.
      lines: the coordinates of each line; may be empty.
      points: whether values are marked.
      from_zero: whether the vertical axis starts at 0.

    Returns:
      HTML with an inline drawing.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 11.0}):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        for i, (at, values) in enumerate(lines):
            colour, dashes = look(i)
            style = (0, tuple(map(float, dashes.split()))) if dashes else "solid"
            marker = "o" if points and len(at) <= 60 else ""
            axis.plot(at, values, color=colour, linestyle=style, marker=marker, markersize=4)
        axis.set_xlabel(x)
        axis.set_xlim(left=0)
        if from_zero:  # with room for a mark at the top
            axis.set_ylim(0, 1.05 * max((max(v, default=0) for _, v in lines), default=0) or 1)
        axis.grid(color=_INK, alpha=0.15)
        axis.set_facecolor("none")
        axis.tick_params(colors=_INK)
        axis.xaxis.label.set_color(_INK)
        axis.spines[["left", "bottom"]].set_color(_INK)
        axis.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(_INK, "currentColor")
    caption = escape(title)
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{caption}, by {escape(x)}"', 1)
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def picture(content: bytes, caption: str) -> str:
    """An inline PNG, in a box that scrolls instead of making it illegible."""
    width = int.from_bytes(content[16:20], "big")  # from the PNG's header
    data = base64.b64encode(content).decode()
    return (
        f'<div class="box picture"><img alt="{escape(caption)}" style="min-width: {width // 2}px" '
        f'src="data:image/png;base64,{data}"></div>'
    )
