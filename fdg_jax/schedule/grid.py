"""Schedules as printed grids, with ticks down and stages across; writing and parsing."""

from __future__ import annotations

from collections.abc import Sequence

from fdg_jax.schedule.action import UPDATE, Action

# The contents of a grid's cells.
LEGEND = """\
F3, B3, U: forward and backward of mini-batch 3, update; F3.1: of its micro-batch 1;
W3: the part of a backward that is for the weights, where it is split.
Stages with the same mini-batch in one tick wait for each other; all else runs at once."""


def write(ticks: Sequence[Sequence[Action]], num_stages: int) -> str:
    """Formats actions as text.

    Args:
      ticks: the actions of each tick.
      num_stages: K.

    Returns:
      Lines, the first with the column heads.

    Example:
      >>> print(write([[Action("F", 0, 0)], [Action("F", 1, 0), Action("F", 0, 1)]], 2))
      tick | stage 0   stage 1
         0 | F0
         1 | F1        F0
    """
    cells = [
        [" ".join(a.label for a in actions if a.stage == k) for k in range(num_stages)]
        for actions in ticks
    ]
    heads = [f"stage {k}" for k in range(num_stages)]
    widths = [
        max(len(text) for text in (head, *(row[k] for row in cells))) + 3
        for k, head in enumerate(heads)
    ]
    lines = ["tick | " + "".join(h.ljust(w) for h, w in zip(heads, widths, strict=True))]
    for t, row in enumerate(cells):
        lines.append(f"{t:4} | " + "".join(c.ljust(w) for c, w in zip(row, widths, strict=True)))
    return "\n".join(line.rstrip() for line in lines)


def parse(text: str) -> list[list[Action]]:
    """Parses a printed grid.

    Args:
      text: as `Schedule.grid` prints it.

    Returns:
      The actions of each tick, stage by stage; a grid does not contain the dispatch order of the
      stages in a tick. An update gets the number of the last gradient before it.

    Raises:
      ValueError: the text is not a grid.

    Example:
      >>> from fdg_jax import schedule
      >>> [str(action) for action in parse(schedule.fdg(2).grid(3))[2]]
      ['F2@0', 'B0@0', 'U@0', 'F1@1', 'B1@1', 'U@1']
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or not lines[0].lstrip().startswith("tick |"):
        raise ValueError("text: is no grid; its first line must be tick | stage 0   stage 1 ...")
    starts = [i for i in range(len(lines[0])) if lines[0].startswith("stage ", i)]
    edges = list(zip(starts, [*starts[1:], None], strict=True))
    last = [-1] * len(edges)
    ticks = []
    for line in lines[1:]:
        actions = []
        for k, (begin, end) in enumerate(edges):
            for label in line[begin:end].split():
                action = Action.parse(f"{label}@{k}", batch=last[k])
                if action.kind != UPDATE.name:
                    last[k] = action.batch
                actions.append(action)
        ticks.append(actions)
    return ticks
