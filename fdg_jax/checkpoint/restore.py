"""Restores a checkpoint: checked against the pipeline first, then read.

Checkpoints are untrusted. Sizes are compared with the pipeline's before memory is allocated, and
nothing in a checkpoint names files, classes or programs to be used.
"""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fdg_jax.checkpoint import array_store, manifest, snapshot
from fdg_jax.checkpoint import extra as extras
from fdg_jax.checkpoint.array_store import leaf
from fdg_jax.engine.initial_state import blank
from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.engine.placement import put
from fdg_jax.engine.state import PipelineState, StageState, scalar
from fdg_jax.typing import PyTree

ARRAYS = "arrays"
# Limits on the size of a checkpoint's files: per byte of its arrays, which compression may enlarge;
# per array, for metadata and index entries; constant.
_BYTE, _EACH, _REST = 2, 1 << 13, 1 << 20


def load(
    pipe: Pipeline,
    folder: pathlib.Path,
    step: int,
    example: tuple[PyTree, PyTree],
    copy: Callable[[list[jax.Array]], list[jax.Array]],
) -> tuple[PipelineState, Any]:
    """Loads the state of a checkpoint, every array on its stage's devices.

    Args:
      pipe: the pipeline that continues from it.
      folder: the checkpoint.
      step: the step in its name.
      example: a batch ``(inputs, labels)``, as large as any in flight.
      copy: copies arrays into buffers owned by JAX.

    Returns:
      The state, and the saved ``extra``.

    Raises:
      Damaged: the checkpoint is damaged.
      ValueError: the configuration of its pipeline differs.
    """
    body = manifest.read(folder)
    _agree(pipe, folder, body)
    manifest.check(body, step, pipe.num_stages)
    _check_counts(pipe, body)
    key, extra = manifest.random_key(body.get("key")), extras.decoded(body["extra"])
    template = pipe.template(example)
    expected = [
        _expected(folder, k, own, body["sections"][k]) for k, own in enumerate(template.stages)
    ]
    leaves = [array for own in expected for array in own.values()]
    size = sum(array.size * array.dtype.itemsize for array in leaves)
    manifest.verify(folder, body, _BYTE * size + _EACH * len(leaves) + _REST)
    # Everything is read before any of it is used; later errors are not due to the checkpoint.
    arrays = [
        array_store.read(folder / ARRAYS, k, own)
        if pipe.stages[k].here
        else array_store.elsewhere(own)
        for k, own in enumerate(expected)
    ]
    stages = []
    for k, (stage, own) in enumerate(zip(pipe.stages, template.stages, strict=True)):
        # The stage's programs donate these buffers, so JAX must own them.
        there = dict(zip(arrays[k], copy(list(arrays[k].values())), strict=True))
        parts = {}
        for name, found in body["sections"][k]:
            if name == "record" and own.record is None:
                continue
            like, structure = jax.tree.flatten(snapshot.template(own, name))
            pairs = zip((there[leaf(name, i)] for i in range(len(found))), like, strict=True)
            parts[name] = jax.tree.unflatten(structure, [snapshot.unraw(*pair) for pair in pairs])
        # ``on_nonfinite`` may differ between the runs.
        fresh = put(pipe.record(), stage.replicated)
        record = fresh if fresh is None else parts.get("record", fresh)
        own_key = put(key, stage.replicated)
        counts = body["counts"][k]
        empty = blank(stage, own)
        stages.append(snapshot.rebuild(stage, empty, own_key, counts, parts, record))
    return PipelineState(scalar(body["tick"]), scalar(body["origin"]), key, tuple(stages)), extra


def _agree(pipe: Pipeline, folder: pathlib.Path, body: dict[str, Any]) -> None:
    """Rejects another configuration and warns about another machine."""
    for name, here in manifest.configuration(pipe).items():
        if (there := body.get(name)) != here:
            made = manifest.short(there)
            says = f"{name}: {folder} was made with {made}, this pipeline has {here}"
            if name in manifest.BINDING:
                raise ValueError(f"{says}; {_remedy(name, made, here)}")
            warnings.warn(f"{says}; the last bits may differ from now on", stacklevel=4)


def _remedy(name: str, made: str, here: Any) -> str:
    if name == "stages":
        return (
            "restore it with the same number and use fdg_jax.checkpoint.convert, or start the run "
            "anew"
        )
    remedy = "restore it with the same, or start the run anew"
    if name == "schedule" and made.partition(" ")[0] == here.partition(" ")[0]:
        return f"the arguments of the schedule differ, such as order or accumulate; {remedy}"
    return remedy


def _check_counts(pipe: Pipeline, body: dict[str, Any]) -> None:
    """Checks that contents and counts are those implied by schedule and tick; otherwise a later
    step would fail."""
    origin = body["origin"]
    for k, own in enumerate(pipe.schedule.holdings(body["tick"] - origin)):
        base = body["counts"][k]["base"]
        counts = snapshot.foretold(own, pipe.schedule, pipe.stages[k].rule, origin, base)
        found = sorted(name for name, _ in body["sections"][k])
        if "record" in found:  # depends on the ``on_nonfinite`` of the run that saved
            found.remove("record")
        if body["counts"][k] != counts:
            raise manifest.Damaged(f"{manifest.NAME}: the counts of stage {k} do not fit the tick")
        names = snapshot.names(counts)
        names += [] if pipe.stages[k].synthesizer is None else ["synthesizer"]
        if found != sorted(names):
            raise manifest.Damaged(
                f"{manifest.NAME}: the sections of stage {k} do not fit the tick"
            )


def _expected(
    folder: pathlib.Path, k: int, own: StageState, sections: list[Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of a stage's arrays, none larger than the pipeline's."""
    expected: dict[str, jax.ShapeDtypeStruct] = {}
    for name, found in sections:
        if name == "record" and own.record is None:  # on_nonfinite="ignore"
            continue
        like = jax.tree.map(snapshot.stored, snapshot.template(own, name))
        exact = name.partition(".")[0] in snapshot.FIXED
        manifest.fit(f"{folder}: stage {k}, {name}", found, like, exact=exact)
        for i, ((dtype, shape), one) in enumerate(zip(found, jax.tree.leaves(like), strict=True)):
            expected[leaf(name, i)] = jax.ShapeDtypeStruct(
                tuple(shape), jnp.dtype(dtype), sharding=one.sharding
            )
    return expected
