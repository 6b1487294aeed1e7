"""A state by its causes: what has to be kept of it so that all of it can be made again.

A batch in flight holds residuals, and those follow from what its forward met: the stage's input, a
version of the weights, a model state, the labels, the root key and a number. Sections name those
causes; residuals are what the stage's own forward program makes of them, to the bit.

    params  model_state  opt_state  number      today's
    gradient                                    accumulated and not yet applied, if any
    record                                      of what was not finite, if anybody looks
    version.7                                   weights after 7 updates, once for all that met them
    flight.12                                   what micro-batch 12 met, beside its weights
    activation.13  cotangent.11  label.13       messages not yet consumed
    metrics.3.0                                 of part 0 of mini-batch 3, not yet averaged
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdg_jax.engine import nonfinite
from fdg_jax.engine.nonfinite import Record
from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.engine.residuals import Stash, split_inexact
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import Flight, StageState
from fdg_jax.typing import Key, PyTree

# Sections whose shapes follow from the network and the optimizer alone, not from the batch.
FIXED = ("params", "model_state", "opt_state", "number", "gradient", "version", "record")


def sections(stage: StageState) -> dict[str, PyTree]:
    """The arrays of one stage from which the rest follows, by the names above.

    Args:
      stage: any state of a stage; nothing is copied or waited for.

    Returns:
      Pytrees by name.
    """
    found: dict[str, PyTree] = {
        "params": stage.params,
        "model_state": stage.model_state,
        "opt_state": stage.opt_state,
        "number": stage.number,
    }
    if stage.gradient is not None:
        found["gradient"] = stage.gradient
    if stage.record is not None:
        found["record"] = stage.record
    versions = dict(stage.older)
    for n, flight in stage.flights.items():
        if flight.params is not None:
            versions.setdefault(flight.version, flight.params)
        stash = flight.stash
        found[f"flight.{n}"] = {
            "inputs": stash.inputs,
            "labels": stash.labels,
            "model_state": stash.model_state,
            "number": stash.number,
        }
    versions.pop(stage.version, None)  # is `params`
    found |= {f"version.{version}": params for version, params in versions.items()}
    found |= {f"activation.{n}": tree for n, tree in stage.activations.items()}
    found |= {f"cotangent.{n}": tree for n, tree in stage.cotangents.items()}
    found |= {f"label.{n}": tree for n, tree in stage.labels.items()}
    for batch, parts in stage.metrics.items():
        found |= {f"metrics.{batch}.{i}": part for i, part in enumerate(parts)}
    return found


def numbers(stage: StageState) -> dict[str, Any]:
    """What a stage counts, fit for JSON.

    Args:
      stage: a state of a stage whose counts are plain integers (`StageState.copied`).

    Returns:
      Its counts, the versions that it keeps, and the version that each batch in flight met.
    """
    return {
        "held": stage.held,
        "version": stage.version,
        "base": stage.base,
        "older": sorted(stage.older),
        "flights": [[n, flight.version] for n, flight in stage.flights.items()],
    }


def templates(pipe: Pipeline, example: tuple[PyTree, PyTree]) -> list[dict[str, PyTree]]:
    """The structure, shapes and dtypes of every section of every stage; nothing is computed.

    Args:
      pipe: the pipeline.
      example: a batch ``(inputs, labels)``; only shapes and dtypes are looked at.

    Returns:
      For each stage pytrees of ``jax.ShapeDtypeStruct`` by the part of the name before the dot.
    """
    x, labels = jax.eval_shape(lambda v: v, example)
    key, number = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    count = pipe.schedule.microbatches
    if count > 1:
        x, labels = (_part(pipe.stages[k], tree, count) for k, tree in ((0, x), (-1, labels)))
    found = []
    for k, stage in enumerate(pipe.stages):
        last = k == pipe.num_stages - 1
        targets = labels if last else None
        params, model_state, opt_state, _ = stage.shapes(x)
        y, *_ = jax.eval_shape(stage.forward, params, model_state, x, targets, key, number, None)
        metrics, cotangent = y if last else (None, split_inexact(y)[0])
        found.append(
            {
                "params": params,
                "model_state": model_state,
                "opt_state": opt_state,
                "number": number,
                "gradient": params,
                "version": params,
                "flight": {
                    "inputs": x,
                    "labels": targets,
                    "model_state": model_state,
                    "number": number,
                },
                "activation": x,
                "cotangent": cotangent,
                "label": targets,
                "metrics": metrics,
                "record": jax.eval_shape(nonfinite.fresh),
            }
        )
        x = y
    return found


def place(stage: Stage, kind: str, template: PyTree) -> PyTree:
    """Where a section's arrays live on a stage's devices; ``kind`` is its name before the dot."""
    if kind == "opt_state":
        return stage.shared(template)
    if kind in FIXED or kind == "metrics":
        return jax.tree.map(lambda leaf: stage.replicated, template)
    shardings = jax.tree.map(stage.placement, template)
    if kind == "flight":
        whole = {name: template[name] for name in ("model_state", "number")}
        shardings |= jax.tree.map(lambda leaf: stage.replicated, whole)
    return shardings


def rebuild(
    stage: Stage,
    today: bool,
    key: Key,
    counts: dict[str, Any],
    parts: dict[str, PyTree],
    record: Record,
) -> StageState:
    """The state of a stage out of its causes.

    Args:
      stage: whose forward program makes the residuals again, where it keeps any.
      today: whether a backward uses the weights of its own day: batches in flight hold none then.
      key: the root key, on this stage's devices.
      counts: as `numbers` gave them.
      parts: as `sections` gave them, on this stage's devices.
      record: the stage's, on its devices, or None where nobody looks.

    Returns:
      The state that the causes were taken from, bit for bit.
    """
    weights = {int(n): tree for n, tree in _numbered(parts, "version")}
    weights[counts["version"]] = parts["params"]
    flights = {}
    for n, version in counts["flights"]:
        met = parts[f"flight.{n}"]
        params = None if today else weights[version]
        stash = Stash(met["inputs"], met["labels"], met["model_state"], met["number"], None)
        if stage.keep_residuals:
            *_, residuals, _ = stage.forward(
                params, stash.model_state, stash.inputs, stash.labels, key, stash.number, record
            )
            stash = stash._replace(residuals=residuals)
        flights[n] = Flight(params, version, stash)
    metrics: dict[int, list[Any]] = {}
    for name, tree in _numbered(parts, "metrics"):
        metrics.setdefault(int(name.split(".")[0]), []).append(tree)
    return StageState(
        params=parts["params"],
        model_state=parts["model_state"],
        opt_state=parts["opt_state"],
        key=key,
        number=parts["number"],
        older={version: weights[version] for version in counts["older"]},
        gradient=parts.get("gradient"),
        held=counts["held"],
        version=counts["version"],
        base=counts["base"],
        flights=flights,
        activations={int(n): tree for n, tree in _numbered(parts, "activation")},
        cotangents={int(n): tree for n, tree in _numbered(parts, "cotangent")},
        labels={int(n): tree for n, tree in _numbered(parts, "label")},
        metrics=metrics,
        record=record,
    )


def _numbered(parts: dict[str, PyTree], kind: str) -> list[tuple[str, PyTree]]:
    return [(n.partition(".")[2], tree) for n, tree in parts.items() if n.startswith(kind + ".")]


def _part(stage: Stage, tree: PyTree, count: int) -> PyTree:
    return jax.eval_shape(lambda v: stage.split(v, count=count)[0], tree)
