"""The picture of one run: loss and error over the epochs."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw(metrics: list[dict[str, Any]], title: str) -> bytes:
    """A PNG with loss (left) and error in percent (right) of every split against epochs.

    Args:
      metrics: lines of metrics.jsonl.
      title: the title of both.

    Returns:
      The file's bytes.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    splits = list(dict.fromkeys(line["split"] for line in metrics))
    for axis, quantity, factor in zip(axes, ("loss", "error"), (1, 100), strict=True):
        for split in splits:
            lines = [m for m in metrics if m["split"] == split and m[quantity] is not None]
            x, y = [m["epoch"] for m in lines], [factor * m[quantity] for m in lines]
            if split == "train":
                axis.plot(x, y, color="tab:blue", linewidth=0.8, alpha=0.7, label="train (running)")
            else:
                axis.plot(x, y, color="tab:orange", marker="o", markersize=4, label=split)
        axis.set_xlabel("epoch")
        axis.set_ylabel("loss" if quantity == "loss" else "error (%)")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    evaluated = [m for m in metrics if m["split"] != "train"]
    if evaluated:
        final = evaluated[-1]
        axes[1].annotate(
            f"{100 * final['error']:.2f} %",
            (final["epoch"], 100 * final["error"]),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
        )
    axes[1].legend(frameon=False)
    # A folder's name may not be valid text.
    figure.suptitle(title.encode("utf-8", "replace").decode(), fontsize=11, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
