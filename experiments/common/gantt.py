"""Gantt charts of timelines: stages down, time across, one cell per program."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from fdg_jax.analysis.timeline import Event, Timeline

COLOURS = {"F": "#9ec5e8", "B": "#f6c08a", "U": "#2e7d32", "FBU": "#c3b1e1"}
NAMES = {"F": "forward", "B": "backward", "U": "update", "FBU": "all three, one program"}
# Inches of the widest and the narrowest picture, and of a cell of the shortest program.
WIDEST, NARROWEST, CELL = 60.0, 8.0, 0.36


def draw(rows: Sequence[tuple[str, Timeline]], marked: int | None = None) -> bytes:
    """A PNG of timelines of the same stages, stacked, with a common time axis.

    Args:
      rows: pairs of title and timeline.
      marked: the mini-batch whose cells have a black edge; None: one third through the run.

    Returns:
      The file's bytes.
    """
    runs = [run for _, run in rows]
    stages = runs[0].schedule.num_stages
    span = max(run.makespan for run in runs)
    lasting = [e.end - e.start for run in runs for e in run.events if e.end > e.start]
    # Outliers of short programs must not make the picture wide.
    shortest = sorted(lasting)[len(lasting) // 20]
    width = min(max(CELL * span / shortest, NARROWEST), WIDEST)
    figure = Figure(figsize=(width, 0.4 + len(rows) * (1.0 + 0.55 * stages)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    traced = runs[0].events[-1].action.batch // 3 if marked is None else marked
    for panel, (title, run) in zip(panels, rows, strict=True):
        for event in run.events:
            _cell(panel, event, traced, (width - 1) / span)
        panel.set_xlim(0, 1.002 * span)
        panel.set_ylim(stages - 0.5, -0.5)
        panel.set_yticks(range(stages), [f"stage {k}" for k in range(stages)])
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_title(title, loc="left", fontsize=11)
    panels[-1].set_xlabel("seconds")
    used = {_kind(event) for run in runs for event in run.events}
    handles = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in COLOURS if kind in used]
    handles.append(Patch(facecolor="white", edgecolor="black", label=f"batch {traced}"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _kind(event: Event) -> str:
    """The kind that determines the colour; a backward with its update is a backward."""
    kinds = "".join(action.kind for action in event.actions)
    return kinds if kinds == "FBU" else kinds[0]


def _cell(panel: Axes, event: Event, traced: int, inches: float) -> None:
    """Draws one program; ``inches`` per second."""
    kind, k, seconds = _kind(event), event.action.stage, event.end - event.start
    if kind == "U" and seconds == 0:  # no duration: drawn as a mark
        panel.plot([event.end] * 2, [k - 0.4, k + 0.4], color=COLOURS["U"], linewidth=2.5)
        panel.text(event.end, k - 0.41, "U", ha="center", va="bottom", fontsize=6)
        return
    this = event.action.batch == traced and kind != "U"
    box = Rectangle(
        (event.start, k - 0.4),
        seconds,
        0.8,
        facecolor=COLOURS[kind],
        edgecolor="black" if this else "white",
        linewidth=1.8 if this else 0.6,
        zorder=3 if this else 1,
    )
    panel.add_patch(box)
    # On one line if it fits, otherwise one line per action.
    for lines in ([event.label], [action.label for action in event.actions]):
        fits = 72 * seconds * inches / (0.75 * max(map(len, lines)))
        if fits >= 5:
            text = panel.text(event.start + seconds / 2, k, "\n".join(lines), zorder=4)
            text.set(ha="center", va="center", fontsize=min(fits, 9))
            text.set_color("white" if kind == "U" else "black")
            break
