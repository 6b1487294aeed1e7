"""Converts a state from K stages to another K.

    source, K = 3    (A, B) │ (C, stacked(D, E)) │ (F,)    params, and trees of their structure:
                       A, B, C, D, E, F                    model state, momentum ...
    target, K = 2    (A, B, C, D) │ (E, F)

Mini-batches in flight depend on the cuts and the schedule, so their gradients are applied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdg_jax.engine.initial_state import blank
from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.engine.stage import Stage
from fdg_jax.engine.state import PipelineState, StageState, scalar
from fdg_jax.layer import chain
from fdg_jax.optim import ChangesState
from fdg_jax.partition.layerwise import difference, join, separate
from fdg_jax.typing import PyTree


def convert(
    source: Pipeline,
    state: PipelineState,
    target: Pipeline,
    example_inputs: PyTree,
    example_labels: PyTree = None,
) -> PipelineState:
    """Converts the state of one pipeline to another pipeline of the same network with other cuts.

    The state is drained first: gradients in flight and an incomplete accumulation are applied. Then
    params, model state and optimizer state move bitwise unchanged to the stages with their layers
    in the other pipeline, which fills from the next batch on.

    From then on the trajectory differs from that of a run that never changed K. The drain applies
    the last gradients earlier than usual; delays, staleness and shrinking are those of the other K;
    weight prediction restarts from the true weights, and an average of weight changes
    (`fdg_jax.track_changes`) from zero. Dropout noise does not change with K: it depends only on
    the micro-batch and the layer's position in the network.

    Args:
      source: the pipeline that made the state.
      state: any state of it; consumed. Drain it before to see its last metrics.
      target: a pipeline of the same layers in the same order, with any number of stages, schedule,
        gradient rule and devices, and an optimizer of the same structure; rates and shrinking may
        differ. The optimizer state may contain copies of the params, array by array (momentum,
        Adam's moments), and arrays equal in all stages (counts of updates).
      example_inputs, example_labels: as for `Pipeline.init`.

    Returns:
      The state of ``target`` as after a drain of the same number of batches, on its devices. Counts
      of skipped micro-batches restart.

    Raises:
      ValueError: the networks or the optimizers differ (the state remains valid), or counts in the
        optimizer states of the stages differ after the drain.
      NonFiniteError: ``source`` has ``on_nonfinite="stop"`` and found a non-finite value.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fdg_jax as fdg
      >>> layers = [fdg.Layer(lambda key, x: (jnp.ones(()), ()),
      ...                     lambda p, s, x, *, train, key: (p * x, s)) for _ in range(3)]
      >>> def pipe(*cuts):
      ...     stages = fdg.partition(layers, len(cuts) + 1, jnp.ones((4, 1)), cost=cuts)
      ...     return fdg.Pipeline(stages, lambda y, t: (jnp.mean((y - t) ** 2), {}),
      ...                         lambda k: optax.adam(0.1), fdg.schedule.fdg(len(stages)))
      >>> three, two = pipe(1, 2), pipe(2)
      >>> state = three.init(jax.random.key(0), jnp.ones((4, 1)))
      >>> state, _ = three.step(state, (jnp.ones((4, 1)), jnp.zeros((4, 1))))
      >>> state = convert(three, state, two, jnp.ones((4, 1)))
      >>> [[round(float(w), 3) for w in stage] for stage in two.params(state)]
      [[0.9, 0.9], [0.9]]
    """
    template = target.template((example_inputs, example_labels))
    shapes_of = _arrays(template)
    _check(_abstract(source, _arrays(state)), _abstract(target, shapes_of))
    state, _ = source.drain(state)
    source.check()
    # Compiled, so that the weights are bitwise equal to `Pipeline.true_params`.
    arrays = []
    for stage, (params, model_state, opt_state) in zip(source.stages, _arrays(state), strict=True):
        params, opt_state = jax.jit(stage.optimizer.without_prediction)(params, opt_state)
        arrays.append((params, model_state, opt_state))
    parts = _parts(source, jax.device_get(arrays))
    shared = {name: _same(name, values) for name, values in parts.shared.items()}
    version = _same("version", [s.version for s in state.stages])
    # Micro-batches are counted as if all batches had been divided as in the target.
    tick = int(state.tick)
    number = np.int32(tick * target.schedule.microbatches)
    made: list[StageState] = []
    first = 0
    for stage, shapes in zip(target.stages, template.stages, strict=True):
        mine = slice(first, first := first + stage.layer.size)
        joined = {name: join(stage.layer, trees[mine]) for name, trees in parts.layers.items()}
        slots, structure = _slots(stage, _untracked(shapes.opt_state))
        copies = {name: stage.optimizer.place.whole(tree) for name, tree in joined.items()}
        whole = jax.tree.unflatten(structure, [(copies | shared)[name] for name in slots])
        whole = _tracked(whole, shapes.opt_state)
        own = joined["params"], joined["model_state"], whole, state.key, number, target.record()
        names = ("params", "model_state", "opt_state", "key", "number", "record")
        placed = dict(zip(names, _own(stage, own), strict=True))
        fresh = blank(stage, shapes)._replace(**placed)
        made.append(fresh._replace(version=scalar(version), base=scalar(version)))
    return PipelineState(scalar(tick), scalar(tick), state.key, tuple(made))


# Params, model state and optimizer state of one stage.
Arrays = tuple[PyTree, PyTree, optax.OptState]


class _Parts(NamedTuple):
    """The arrays of all stages by name, independent of the cuts.

    Attributes:
      layers: one pytree per layer of the network.
      shared: arrays of the optimizer states that belong to no layer, one per stage.
    """

    layers: dict[str, list[PyTree]]
    shared: dict[str, list[Any]]


class _Copy:
    """A tree in an optimizer state with the structure of the params, as a leaf."""

    def __init__(self, tree: PyTree) -> None:
        self.tree = tree


def _arrays(state: PipelineState) -> list[Arrays]:
    return [(s.params, s.model_state, _untracked(s.opt_state)) for s in state.stages]


def _parts(pipe: Pipeline, arrays: Sequence[Arrays]) -> _Parts:
    network = chain([stage.layer for stage in pipe.stages])
    params, model_state, opt_states = zip(*arrays, strict=True)
    parts = _Parts(
        {"params": separate(network, params), "model_state": separate(network, model_state)}, {}
    )
    found = [_slots(*pair)[0] for pair in zip(pipe.stages, opt_states, strict=True)]
    for k, slots in enumerate(found):
        if slots.keys() != found[0].keys():
            raise ValueError(
                f"optimizer: its state has {', '.join(slots) or 'nothing'} in stage {k}, and "
                f"{', '.join(found[0]) or 'nothing'} in stage 0; layers can only change stages "
                "where all have the same"
            )
    for name in found[0]:
        values = [slots[name] for slots in found]
        if not isinstance(values[0], _Copy):
            parts.shared[name] = values
            continue
        places = (stage.optimizer.place for stage in pipe.stages)
        trees = [at.own(value.tree) for at, value in zip(places, values, strict=True)]
        for tree, own in zip(trees, params, strict=True):
            _check_copy(name, tree, own)
        parts.layers[name] = separate(network, tuple(trees))
    return parts


def _abstract(pipe: Pipeline, arrays: Sequence[Arrays]) -> _Parts:
    """The same as shapes and dtypes."""
    parts: _Parts = jax.eval_shape(lambda own: _parts(pipe, own), arrays)
    return parts


def _slots(stage: Stage, opt_state: optax.OptState) -> tuple[dict[str, Any], Any]:
    """Copies of the params and other arrays of an optimizer state without averages of changes, by
    path, and its structure."""

    def init(params: PyTree) -> optax.OptState:
        return _untracked(stage.optimizer.given.init(params))

    try:
        marked = optax.tree.map_params(init, _Copy, opt_state, is_leaf=lambda tree: True)
    except Exception as error:
        raise ValueError(
            "optimizer: what in its state mirrors the params cannot be told from the rest "
            f"({error}); take one that optax.tree.map_params understands"
        ) from error
    leaves, structure = jax.tree_util.tree_flatten_with_path(marked)
    return {f"opt_state{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}, structure


def _is_tracked(node: Any) -> bool:
    return isinstance(node, ChangesState)


def _untracked(opt_state: optax.OptState) -> optax.OptState:
    """An optimizer state without averages of weight changes, which only some stages have."""

    def inner(node: Any) -> Any:
        return _untracked(node.inner) if _is_tracked(node) else node

    return jax.tree.map(inner, opt_state, is_leaf=_is_tracked)


def _tracked(opt_state: optax.OptState, like: optax.OptState) -> optax.OptState:
    """The inverse of `_untracked`, with zero averages of the shapes in ``like``."""

    def outer(node: Any, inner: Any) -> Any:
        if not _is_tracked(node):
            return inner
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), node.average)
        return ChangesState(_tracked(inner, node.inner), zeros)

    return jax.tree.map(outer, like, opt_state, is_leaf=_is_tracked)


def _check_copy(name: str, tree: PyTree, params: PyTree) -> None:
    """Checks that a tree can be cut like the params; masks may have removed arrays."""
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.shape != shapes.get(path):
            raise ValueError(
                f"optimizer: {name}{jax.tree_util.keystr(path)} has shape {leaf.shape}, its "
                f"parameter {shapes.get(path)}; only arrays of equal shapes are cut and stacked "
                "as the params are"
            )


def _check(ours: _Parts, theirs: _Parts) -> None:
    """Checks that everything has a place in the target pipeline."""
    counts = [len(side.layers["params"]) for side in (ours, theirs)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"target: has {counts[1]} layers, source has {counts[0]}; both must cut one network"
        )
    for name in ours.layers | theirs.layers | ours.shared | theirs.shared:
        for kind in ("layers", "shared"):
            if (name in getattr(ours, kind)) != (name in getattr(theirs, kind)):
                raise ValueError(
                    f"target: its optimizer and that of source differ in {name}; give both the "
                    "same, but for rates and shrinking"
                )
    # Params first, because the other trees mirror them.
    for name in ("params", *ours.layers):
        for i, pair in enumerate(zip(ours.layers[name], theirs.layers[name], strict=True)):
            if found := difference(*pair):
                raise ValueError(
                    f"target: {name} of layer {i}: {found}; source and target must cut one network"
                )
    for name, values in ours.shared.items():
        if found := difference(values[0], theirs.shared[name][0]):
            raise ValueError(f"target: {name}: {found}; give both the same optimizer")


def _same(name: str, values: Sequence[Any]) -> Any:
    """The value that all stages share."""

    def bits(value: Any) -> bytes:
        key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(value) if key else value).tobytes()

    if any(bits(value) != bits(values[0]) for value in values):
        raise ValueError(
            f"state: {name} is {', '.join(map(str, values))} in its stages after the drain; layers "
            "can only change stages where all have the same"
        )
    return values[0]


def _own(stage: Stage, tree: PyTree) -> Any:
    """Buffers owned by JAX on a stage's devices, which may be donated."""
    return jax.jit(lambda v: jax.tree.map(jnp.copy, v))(jax.device_put(tree, stage.replicated))
