"""What one stage does: forward, backward, update."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Action:
    """One thing that one stage does.

    Args:
      kind: "F" forward, "B" backward, "U" update.
      batch: number of the mini-batch; for an update, of the last batch whose gradient it applies.
      stage: 0 is next to the input.
      micro: number of the micro-batch inside the mini-batch, where mini-batches are divided.
      version: of a forward: which weights it uses, as the number of updates that made them, counted
        from the last fill. None: today's.

    Example:
      >>> print(Action("F", 3, 1), Action("U", 3, 1), Action("B", 3, 1, micro=2))
      F3@1 U@1 B3.2@1
    """

    kind: Literal["F", "B", "U"]
    batch: int
    stage: int
    micro: int | None = None
    version: int | None = None

    @property
    def label(self) -> str:
        """The action without its stage, as it stands in a cell of the grid."""
        if self.kind == "U":
            return "U"
        micro = "" if self.micro is None else f".{self.micro}"
        version = "" if self.version is None else f"v{self.version}"
        return f"{self.kind}{self.batch}{micro}{version}"

    def __str__(self) -> str:
        return f"{self.label}@{self.stage}"


def needs(action: Action, num_stages: int) -> list[Action]:
    """What must have been done before a forward or backward: where its inputs come from."""
    k = action.stage
    before = []
    if action.kind == "F" and k > 0:
        before = [replace(action, stage=k - 1, version=None)]
    elif action.kind == "B":
        before = [replace(action, kind="F", version=None)]
        before += [replace(action, stage=k + 1)] if k < num_stages - 1 else []
    return before
