"""Actions, and what each kind of action consumes, produces and stores.

    kind   takes                  gives                        in flight   gradient
    F      activation of hop 0    activation to hop +1         opens
    B      cotangent of hop 0     cotangent to hop -1          closes      adds
    U                                                                      applies

Hop 0 is the stage itself, +1 the next stage, -1 the previous one. A stage with a loss gives the
cotangent of its output to itself in its forward. All counts of a schedule (delay, staleness,
contents of stages) follow from such a table and the stream of actions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

ACTIVATION, COTANGENT, OUTPUT_COTANGENT = "activation", "cotangent", "output_cotangent"
# An array used by two stages (`fdg_jax.tie`), and the gradient of its second use.
TIED, TIED_GRADIENT = "tied", "tied_gradient"
OUTPUT = "output"  # the stage's output and labels, for its synthesizer


class Port(NamedTuple):
    """A type of message of one micro-batch.

    Attributes:
      name: such as "activation" or "cotangent".
      hop: 0: the stage itself; +1: the next stage; -1: the previous stage.
    """

    name: str
    hop: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind of action.

    Args:
      name: a capital letter, printed in the grid before the number of the mini-batch.
      takes: messages that it consumes, from the stage's own inbox (hop 0).
      gives: messages that it sends.
      in_flight: its effect on the stage's stored data of the micro-batch: "opens" (a forward),
        "reads", "closes" (the last use), or "none".
      gradient: "adds" one to the stage's sum, "applies" the sum (an update), or "none".

    Example:
      >>> FORWARD.gives
      (Port(name='activation', hop=1),)
    """

    name: str
    takes: tuple[Port, ...] = ()
    gives: tuple[Port, ...] = ()
    in_flight: Literal["opens", "reads", "closes", "none"] = "none"
    gradient: Literal["adds", "applies", "none"] = "none"


FORWARD = Kind("F", (Port(ACTIVATION),), (Port(ACTIVATION, 1),), "opens")
BACKWARD = Kind("B", (Port(COTANGENT),), (Port(COTANGENT, -1),), "closes", "adds")
UPDATE = Kind("U", gradient="applies")
KINDS = (FORWARD, BACKWARD, UPDATE)

# A split backward (zero-bubble): B for the input, immediately, and W for the weights, later.
BACKWARD_INPUT = Kind(
    "B", (Port(COTANGENT),), (Port(COTANGENT, -1), Port(OUTPUT_COTANGENT)), "reads"
)
BACKWARD_WEIGHTS = Kind("W", (Port(OUTPUT_COTANGENT),), (), "closes", "adds")
SPLIT_KINDS = (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHTS, UPDATE)

# A backward without a message: every stage has its own loss.
LOCAL_BACKWARD = Kind("B", (Port(COTANGENT),), (), "closes", "adds")
LOCAL_KINDS = (FORWARD, LOCAL_BACKWARD, UPDATE)


# Predicted cotangents: P is a backward with the cotangent predicted by the stage's synthesizer, T
# trains the synthesizer. Its target is the cotangent that the next stage computed from its own
# prediction (PREDICTED_KINDS), or the true one (LATE_KINDS), which is passed on as in FDG: by B if
# it also gives the stage's gradient, by D if the stage has already learned from the prediction.
_PREDICTING = Kind("F", (Port(ACTIVATION),), (Port(ACTIVATION, 1), Port(OUTPUT)), "opens")
PREDICTED_KINDS = (
    _PREDICTING,
    Kind("P", (Port(OUTPUT),), (Port(OUTPUT), Port(COTANGENT, -1)), "closes", "adds"),
    Kind("T", (Port(COTANGENT), Port(OUTPUT))),
    BACKWARD,
    UPDATE,
)
LATE_KINDS = (
    _PREDICTING,
    Kind("P", (Port(OUTPUT),), (Port(OUTPUT),), "reads", "adds"),
    Kind("T", (Port(COTANGENT), Port(OUTPUT)), (Port(COTANGENT),)),
    Kind("D", (Port(COTANGENT),), (Port(COTANGENT, -1),), "closes"),
    BACKWARD,
    UPDATE,
)


class Action(NamedTuple):
    """One action of one stage.

    Attributes:
      kind: name of its `Kind`: "F" forward, "B" backward, "U" update.
      batch: number of the mini-batch; for an update, the last batch whose gradient it applies.
      stage: 0 is the input stage.
      micro: number of the micro-batch within the mini-batch, if mini-batches are divided.
      version: weights of a forward, as the number of updates since the last fill. None: the newest.

    Example:
      >>> print(Action("F", 3, 1), Action("U", 3, 1), Action("B", 3, 1, micro=2))
      F3@1 U@1 B3.2@1
      >>> Action.parse("B3.2@1")
      Action(kind='B', batch=3, stage=1, micro=2, version=None)
    """

    kind: str
    batch: int
    stage: int
    micro: int | None = None
    version: int | None = None

    @property
    def label(self) -> str:
        """The action without its stage, as in a cell of the grid."""
        if self.kind == UPDATE.name:
            return UPDATE.name
        micro = "" if self.micro is None else f".{self.micro}"
        version = "" if self.version is None else f"v{self.version}"
        return f"{self.kind}{self.batch}{micro}{version}"

    def __str__(self) -> str:
        return f"{self.label}@{self.stage}"

    @staticmethod
    def parse(text: str, batch: int = -1) -> Action:
        """Parses the printed form of an action.

        Args:
          text: such as "F3@1".
          batch: number for an update, which is printed without one.

        Returns:
          The action.

        Raises:
          ValueError: the text is not an action.
        """
        found = re.fullmatch(r"([A-Z])(\d*)(?:\.(\d+))?(?:v(\d+))?@(\d+)", text)
        if found is None or (not found[2] and found[1] != UPDATE.name):
            raise ValueError(f"text={text!r}: is no action; write one as F3@1, B3.2@0 or U@1")
        kind, number, micro, version, stage = found.groups()
        return Action(
            kind,
            int(number) if number else batch,
            int(stage),
            None if micro is None else int(micro),
            None if version is None else int(version),
        )
