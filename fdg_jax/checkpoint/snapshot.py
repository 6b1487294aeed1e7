"""The part of a state that is stored, from which the rest is rebuilt.

Residuals are not stored: the stage's forward program recomputes them bitwise from the arguments of
the forward (the stage's input, a weight version, a model state, the labels, the root key and a
number). Neither are empty slots. The rest is stored in sections:

    params  model_state  opt_state  number      the newest
    gradient                                    sum of those not yet applied, if any
    record                                      of non-finite values, if checked
    synthesizer                                 state of the synthesizer, if any
    versions.7                                  weights after 7 updates, shared by mini-batches
    flights.12                                  data stored for micro-batch 12, without residuals
    activation.13  cotangent.11  label.13       messages not yet consumed
"""

from __future__ import annotations

from typing import Any

import jax

from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.nonfinite import Record
from fdg_jax.engine.residuals import Stash
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import StageState, StageWork
from fdg_jax.schedule import Schedule
from fdg_jax.schedule.ledger import Holding
from fdg_jax.typing import Key, PyTree

_ALWAYS = ("params", "model_state", "opt_state", "number")
# Sections whose shapes follow from the network and the optimizer alone, not from the batch.
FIXED = (*_ALWAYS, "gradient", "versions", "record", "synthesizer")


def sections(stage: StageState) -> dict[str, PyTree]:
    """The stored arrays of one stage, by section name.

    Args:
      stage: any state of a stage; it is not copied, and nothing waits.

    Returns:
      Pytrees by name.
    """
    found: dict[str, PyTree] = {name: getattr(stage, name) for name in _ALWAYS}
    if int(stage.pending):
        found["gradient"] = stage.gradient
    if stage.record is not None:
        found["record"] = stage.record
    if stage.synthesizer is not None:
        found["synthesizer"] = stage.synthesizer
    found |= {f"versions.{version}": params for version, params in stage.versions.items()}
    for n, stash in stage.flights.items():
        found[f"flights.{n}"] = stash._replace(residuals=None)
    for port, slots in stage.inbox.items():
        found |= {f"{port}.{n}": value for n, value in slots.items()}
    return found


def template(stage: StageState, name: str) -> PyTree:
    """The shapes, dtypes and shardings of a section.

    Args:
      stage: a stage of `Pipeline.template`.
      name: the section.

    Returns:
      A pytree of ``jax.ShapeDtypeStruct``; None if the stage has no such section.
    """
    kind = name.partition(".")[0]
    slots = {"versions": stage.versions, "flights": stage.flights, **stage.inbox}
    if kind not in slots:
        return getattr(stage, kind, None) if kind in FIXED else None
    if not slots[kind].values:
        return None
    value = slots[kind].values[0]
    return value._replace(residuals=None) if isinstance(value, Stash) else value


def numbers(stage: StageState) -> dict[str, Any]:
    """The counters of a stage and the numbers in its slots, as JSON data."""
    own = StageWork(stage)
    return {
        "pending": own.pending,
        "version": own.version,
        "base": own.base,
        "versions": sorted(own.versions),
        "flights": [[n, version] for n, (version, _) in own.flights.items()],
        "inbox": {port: sorted(found) for port, found in own.inbox.items() if found},
    }


def foretold(
    own: Holding, schedule: Schedule, rule: GradientRule, origin: int, base: int
) -> dict[str, Any]:
    """The `numbers` of a stage as implied by the schedule.

    Args:
      own: the stage's contents, counted from the last drain (`Schedule.holdings`).
      schedule: the pipeline's schedule.
      rule: the stage's gradient rule.
      origin: the number of the first mini-batch after the last drain.
      base: the number of updates before it.

    Returns:
      The same as `numbers`.
    """
    parts, version = origin * schedule.microbatches, base + own.version
    flights = sorted([n + parts, met + base] for n, (met, _) in own.flights.items())
    kept = set(range(max(base, version - schedule.versions + 1), version))
    if rule.keeps_weights:
        kept |= {met for _, met in flights}
    return {
        "pending": own.pending,
        "version": version,
        "base": base,
        "versions": sorted(kept - {version}),
        "flights": flights,
        "inbox": {
            port: sorted(n + parts for n in found) for port, found in own.inbox.items() if found
        },
    }


def names(counts: dict[str, Any]) -> list[str]:
    """The sections of a stage with these `numbers`, except record and synthesizer."""
    found = [*_ALWAYS, *(["gradient"] if counts["pending"] else [])]
    found += [f"versions.{version}" for version in counts["versions"]]
    found += [f"flights.{n}" for n, _ in counts["flights"]]
    found += [f"{port}.{n}" for port, there in counts["inbox"].items() for n in there]
    return found


def rebuild(
    stage: Stage,
    blank: StageState,
    key: Key,
    counts: dict[str, Any],
    parts: dict[str, PyTree],
    record: Record,
) -> StageState:
    """Rebuilds the state of a stage from its sections.

    Args:
      stage: the stage, whose forward program recomputes residuals if it stores any.
      blank: a state of the stage with empty slots.
      key: the root key, on this stage's devices.
      counts: the result of `numbers`.
      parts: the result of `sections`, on this stage's devices.
      record: the stage's record, on its devices, or None if not checked.

    Returns:
      A state bitwise equal to the one that was saved.
    """
    own = StageWork(blank)
    own.params, own.model_state = parts["params"], parts["model_state"]
    own.opt_state, own.number = parts["opt_state"], parts["number"]
    own.key, own.record = key, record
    own.version, own.base, own.pending = counts["version"], counts["base"], counts["pending"]
    own.gradient, own.synthesizer = parts.get("gradient"), parts.get("synthesizer")
    own.versions = {v: parts[f"versions.{v}"] for v in counts["versions"]}
    for n, version in counts["flights"]:
        stash: Stash = parts[f"flights.{n}"]
        if stage.rule.keeps_residuals:
            made = stage.forward(
                own.weights(version),
                stash.model_state,
                stash.inputs,
                stash.labels,
                key,
                stash.number,
                record,
            )
            stash = stash._replace(residuals=made.residuals)
        own.flights[n] = (version, stash)
    for port, there in counts["inbox"].items():
        for n in there:
            own.put(port, n, parts[f"{port}.{n}"])
    return own.packed(stage.zeros)


def raw(leaf: Any) -> Any:
    """An array as stored: a random key as its data; traceable."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and dtype of `raw`, with the same sharding."""
    if not _is_key(leaf):
        return leaf
    found = jax.eval_shape(jax.random.key_data, _plain(leaf))
    return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=leaf.sharding)


def unraw(array: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """The inverse of `raw`, with the dtype of a template's leaf."""
    if not _is_key(leaf):
        return array
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), _plain(leaf))
    return jax.random.wrap_key_data(array, impl=kinds[0])


def _plain(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))
