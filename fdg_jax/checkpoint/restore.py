"""A checkpoint on disk to a state: checked against the pipeline first, then read.

Whoever made it may be a stranger. Sizes are those that the pipeline has, and are compared before
memory is taken; nothing in a checkpoint names a file, a class or a program that would be used.
"""

from __future__ import annotations

import math
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from fdg_jax.checkpoint import manifest, snapshot
from fdg_jax.engine import ledger
from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.engine.placement import absent, put
from fdg_jax.engine.state import PipelineState
from fdg_jax.typing import PyTree

ARRAYS = "arrays"
# How large the files of a checkpoint may be: for a byte of its arrays, which may grow when they are
# compressed; for each array, of which there are descriptions and entries of an index; in all.
_BYTE, _EACH, _REST = 2, 1 << 13, 1 << 20

Abstract = dict[str, jax.ShapeDtypeStruct]


def load(
    pipe: Pipeline,
    folder: pathlib.Path,
    step: int,
    example: tuple[PyTree, PyTree],
    copy: Callable[[list[jax.Array]], list[jax.Array]],
) -> tuple[PipelineState, Any]:
    """The state in a checkpoint, every array on its stage's devices.

    Args:
      pipe: the pipeline that goes on with it.
      folder: the checkpoint.
      step: the step that it goes by.
      example: a batch ``(inputs, labels)``, as large as any in flight.
      copy: copies arrays into buffers of JAX's own.

    Returns:
      The state, and what was saved beside it.

    Raises:
      Damaged: it is not whole.
      ValueError: it was made by a pipeline of another configuration.
    """
    body = manifest.read(folder)
    _agree(pipe, folder, body)
    manifest.check(body, step, pipe.num_stages)
    _check_counts(pipe, body)
    key, extra = manifest.random_key(body.get("key")), manifest.decoded(body["extra"])
    templates = snapshot.templates(pipe, example)
    abstract = [_abstract(pipe, folder, body, templates, k) for k in range(pipe.num_stages)]
    leaves = [array for own in abstract for array in own.values()]
    size = sum(array.size * array.dtype.itemsize for array in leaves)
    manifest.verify(folder, body, _BYTE * size + _EACH * len(leaves) + _REST)
    # All is read before any of it is used: what comes after this is no question of the checkpoint.
    arrays = [
        read(folder / ARRAYS / entry(k), own) if pipe.stages[k].here else elsewhere(own)
        for k, own in enumerate(abstract)
    ]
    stages = []
    for k, (stage, template) in enumerate(zip(pipe.stages, templates, strict=True)):
        # Programs of this stage's devices donate these: they must be buffers of JAX's own.
        there = dict(zip(arrays[k], copy(list(arrays[k].values())), strict=True))
        parts = {
            name: jax.tree.unflatten(
                jax.tree.structure(template[name.partition(".")[0]]),
                [there[leaf(name, i)] for i in range(len(found))],
            )
            for name, found in body["sections"][k]
        }
        own_key = put(key, stage.replicated)
        today = pipe.gradient == "recompute"
        # Whether anybody looks may change from one run to the next.
        fresh = put(pipe.record(), stage.replicated)
        record = fresh if fresh is None else parts.get("record", fresh)
        counts = body["counts"][k]
        stages.append(snapshot.rebuild(stage, today, own_key, counts, parts, record))
    return PipelineState(body["tick"], body["origin"], key, tuple(stages)), extra


def read(folder: pathlib.Path, expected: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays of one stage, as Orbax wrote them.

    They are read by the store that Orbax keeps them in, which checks dtype and shape before it
    reads; what Orbax writes beside them, such as names of its classes, is not looked at.

    Args:
      folder: the stage's entry.
      expected: shape, dtype and sharding of each array, by name.

    Returns:
      Arrays by name.

    Raises:
      Damaged: one is missing, cannot be read, or is another.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 26}})
    opened, found = {}, {}
    try:
        for name, like in expected.items():
            if like.size:  # Orbax takes no array without elements
                opened[name] = ts.open(
                    spec(folder, name),
                    read=True,
                    open=True,
                    context=context,
                    dtype=ts.dtype(str(like.dtype)),
                    shape=like.shape,
                )
        for name, future in opened.items():
            store = future.result()
            # A chunk is decoded as a whole: it must not be larger than the array.
            piece = store.chunk_layout.write_chunk.shape or ()
            if math.prod(n or 0 for n in piece) > expected[name].size:
                raise ValueError(f"{name} is stored in pieces larger than itself")
            found[name] = store.read()
        values = {name: future.result() for name, future in found.items()}
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        reason = str(error).partition(" [tensorstore_spec=")[0]
        raise manifest.Damaged(f"{folder.name}: {reason}") from error
    return {
        name: put(values[name] if like.size else np.zeros(like.shape, like.dtype), like.sharding)
        for name, like in expected.items()
    }


def elsewhere(expected: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays of a stage that another process has: here their shapes alone."""
    return {name: absent(like, like.sharding) for name, like in expected.items()}


def spec(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Where TensorStore finds an array of a stage's entry."""
    files = {"driver": "file", "path": f"{folder}/"}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": files, "path": f"{name}/"},
    }


def entry(k: int) -> str:
    """The name of stage k's entry."""
    return f"stage_{k}"


def leaf(section: str, i: int) -> str:
    """The name of an array of a section."""
    return f"{section}/{i}"


def _agree(pipe: Pipeline, folder: pathlib.Path, body: dict[str, Any]) -> None:
    """Refuses another configuration, and warns of another machine."""
    for name, here in manifest.configuration(pipe).items():
        if (there := body.get(name)) != here:
            made = manifest.short(there)
            says = f"{name}: {folder} was made with {made}, this pipeline has {here}"
            if name in manifest.BINDING:
                raise ValueError(f"{says}; restore it with the same, or start the run anew")
            warnings.warn(f"{says}; the last bits may differ from now on", stacklevel=4)


def _check_counts(pipe: Pipeline, body: dict[str, Any]) -> None:
    """What is in flight follows from schedule and counts; a checkpoint that has more or less is
    none of this pipeline, and would fail in some later step."""
    origin, today = body["origin"], pipe.gradient == "recompute"
    there = ledger.inventory(pipe.schedule, body["tick"] - origin)
    for k, holding in enumerate(there):
        base = body["counts"][k]["base"]
        counts, names = ledger.numbers(holding, pipe.schedule, origin, base, today)
        found = sorted(name for name, _ in body["sections"][k])
        if "record" in found:  # there or not, as the run that saved chose
            found.remove("record")
        if body["counts"][k] != counts:
            raise manifest.Damaged(f"{manifest.NAME}: the counts of stage {k} do not fit the tick")
        if found != sorted(names):
            raise manifest.Damaged(
                f"{manifest.NAME}: the sections of stage {k} do not fit the tick"
            )


def _abstract(
    pipe: Pipeline,
    folder: pathlib.Path,
    body: dict[str, Any],
    templates: list[dict[str, PyTree]],
    k: int,
) -> Abstract:
    """Shape, dtype and place of every array of a stage, none of them larger than the pipeline's."""
    own: Abstract = {}
    for name, found in body["sections"][k]:
        kind = name.partition(".")[0]
        template = templates[k][kind]
        what, exact = f"{folder}: stage {k}, {name}", kind in snapshot.FIXED
        manifest.fit(what, found, template, exact=exact)
        places = jax.tree.leaves(snapshot.place(pipe.stages[k], kind, template))
        for i, ((dtype, shape), place) in enumerate(zip(found, places, strict=True)):
            own[leaf(name, i)] = jax.ShapeDtypeStruct(
                tuple(shape), jnp.dtype(dtype), sharding=place
            )
    return own
