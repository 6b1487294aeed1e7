"""The state of a pipeline: stages, mini-batches in flight, pending messages.

A state is an ordinary pytree. Its structure, shapes and dtypes are the same from `Pipeline.init` to
the end of `Pipeline.drain`: numbered values are stored in slots, and empty slots hold zeros.

    numbers   [6, 7, 8, -1]         flight 6 is in slot 6 mod 4 = 2 ... : number n in slot n mod S
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax

from fdg_jax.engine.nonfinite import Record
from fdg_jax.engine.synthesizer import SynthesizerState
from fdg_jax.schedule.ledger import Holding
from fdg_jax.typing import Key, PyTree


class Slots(NamedTuple):
    """Numbered values: number n in slot n mod S.

    Attributes:
      numbers: int32 [S], on the host; -1 where a slot is empty.
      values: S pytrees of one structure; zeros where a slot is empty.
    """

    numbers: np.ndarray
    values: tuple[PyTree, ...]

    def items(self) -> list[tuple[int, PyTree]]:
        """Number and value of every non-empty slot, by number."""
        # A no-op unless jax.tree.map has moved the state's counters to a device.
        pairs = zip(np.asarray(self.numbers).tolist(), self.values, strict=True)
        return sorted(((n, value) for n, value in pairs if n >= 0), key=lambda pair: pair[0])

    def on_host(self) -> Slots:
        """The same with its numbers as a numpy array."""
        return self._replace(numbers=np.array(self.numbers))

    def filled(self, values: Mapping[int, PyTree], zeros: Callable[[PyTree], PyTree]) -> Slots:
        """Slots of the same shapes with other values.

        Args:
          values: by number; each in a different slot.
          zeros: makes zeros with the shapes and placement of a value, for emptied slots.
        """
        size = len(self.values)
        numbers, slots = [-1] * size, [None] * size
        for n, value in values.items():
            if not size or numbers[n % size] >= 0:
                raise ValueError(
                    f"schedule: holds {sorted(values)} between two ticks, for which {size} places "
                    "were counted; give the Schedule the period after which its rule repeats"
                )
            numbers[n % size], slots[n % size] = n, value
        if len(values) < size:
            empty = [v for n, v in zip(self.numbers, self.values, strict=True) if n < 0]
            blank = empty[0] if empty else zeros(self.values[0])
            slots = [blank if n < 0 else v for n, v in zip(numbers, slots, strict=True)]
        return Slots(np.array(numbers, np.int32), tuple(slots))


class StageState(NamedTuple):
    """The state of one stage, on its own devices; counters are int32 scalars on the host.

    Micro-batches are numbered consecutively: micro-batch m of mini-batch n is n * microbatches + m,
    which is n if mini-batches are not divided.

    Attributes:
      params, model_state, opt_state: the newest.
      key: the root key.
      number: micro-batches forwarded so far, int32.
      gradient: sum of the gradients not yet applied, zeros if there are none; None for schedules
        without pending gradients between ticks.
      pending: number of gradients in that sum.
      version: number of updates so far.
      base: number of updates before the last fill.
      flights: data stored for the backward of each micro-batch in flight.
      met: int32 [S], weight version of the forward of each flight, in the same slots.
      versions: earlier weights needed by flights or the schedule, by version.
      inbox: messages not yet consumed, by port: slots by micro-batch.
      record: of non-finite values (`nonfinite.py`), or None if not checked.
      synthesizer: state of the stage's synthesizer, or None.
    """

    params: PyTree
    model_state: PyTree
    opt_state: optax.OptState
    key: Key
    number: jax.Array
    gradient: PyTree
    pending: np.ndarray
    version: np.ndarray
    base: np.ndarray
    flights: Slots
    met: np.ndarray
    versions: Slots
    inbox: dict[str, Slots]
    record: Record
    synthesizer: SynthesizerState | None = None


class PipelineState(NamedTuple):
    """The state of a pipeline, a pytree. ``jax.tree.map(jnp.copy, state)`` copies it.

    Attributes:
      tick: the number of mini-batches that have entered, int32.
      origin: the number of the first mini-batch after the last drain, int32.
      key: the root key.
      stages: one `StageState` per stage.
    """

    tick: np.ndarray
    origin: np.ndarray
    key: Key
    stages: tuple[StageState, ...]

    def on_host(self) -> PipelineState:
        """The same with its counters as numpy arrays, which `jax.tree.map` may have moved."""
        if isinstance(self.tick, np.ndarray):
            return self
        stages = []
        for own in self.stages:
            inbox = {port: slots.on_host() for port, slots in own.inbox.items()}
            counters = {
                name: np.array(getattr(own, name)) for name in ("pending", "version", "base", "met")
            }
            slots = {"flights": own.flights.on_host(), "versions": own.versions.on_host()}
            stages.append(own._replace(inbox=inbox, **counters, **slots))
        return PipelineState(np.array(self.tick), np.array(self.origin), self.key, tuple(stages))

    def __repr__(self) -> str:
        return f"<PipelineState of {len(self.stages)} stages, tick {self.tick}>"


class StageWork(Holding):
    """A stage's state during a tick: a mutable copy with dictionaries instead of slots.

    The bookkeeping is that of `fdg_jax.schedule.ledger.Holding`, with arrays as values.

    Args:
      state: initial state; its slots are the template for `packed`.
    """

    __slots__ = (
        "base",
        "gradient",
        "key",
        "model_state",
        "number",
        "opt_state",
        "params",
        "record",
        "state",
        "synthesizer",
        "versions",
    )

    def __init__(self, state: StageState) -> None:
        self.state = state
        self.params, self.model_state = state.params, state.model_state
        self.opt_state, self.key = state.opt_state, state.key
        self.number, self.record = state.number, state.record
        self.synthesizer = state.synthesizer
        self.version, self.base = int(state.version), int(state.base)
        self.pending = int(state.pending)
        self.gradient = state.gradient if self.pending else None
        size = len(state.flights.values)
        self.flights = {n: (int(state.met[n % size]), stash) for n, stash in state.flights.items()}
        self.versions: dict[int, PyTree] = dict(state.versions.items())
        self.inbox = {port: dict(slots.items()) for port, slots in state.inbox.items()}

    def weights(self, version: int) -> PyTree:
        """The weights after the given number of updates."""
        return self.params if version == self.version else self.versions[version]

    def update(self, params: PyTree, opt_state: PyTree, record: Record) -> None:
        """Sets new weights; keeps the old ones as an earlier version and clears the gradient."""
        self.versions[self.version] = self.params
        self.params, self.opt_state, self.record = params, opt_state, record
        self.gradient, self.pending = None, 0
        self.version += 1

    def packed(self, zeros: Callable[[PyTree], PyTree]) -> StageState:
        """The resulting `StageState`.

        Args:
          zeros: makes zeros with the shapes and placement of a pytree.
        """
        old = self.state
        gradient = self.gradient
        if gradient is None and old.gradient is not None:
            gradient = zeros(self.params) if int(old.pending) else old.gradient
        size = len(old.flights.values)
        met = np.zeros(size, np.int32)
        for n, (version, _) in self.flights.items():
            met[n % size] = version
        flights = {n: stash for n, (_, stash) in self.flights.items()}
        none = Slots(np.zeros(0, np.int32), ())
        return StageState(
            params=self.params,
            model_state=self.model_state,
            opt_state=self.opt_state,
            key=self.key,
            number=self.number,
            gradient=gradient,
            pending=scalar(self.pending),
            version=scalar(self.version),
            base=scalar(self.base),
            flights=old.flights.filled(flights, zeros),
            met=met,
            versions=old.versions.filled(self.versions, zeros),
            inbox={
                port: old.inbox.get(port, none).filled(self.inbox.get(port, {}), zeros)
                for port in sorted(old.inbox.keys() | self.inbox.keys())
                if port in old.inbox or self.inbox[port]
            },
            record=self.record,
            synthesizer=self.synthesizer,
        )


def scalar(value: int) -> np.ndarray:
    """A counter of a state."""
    return np.array(value, np.int32)
