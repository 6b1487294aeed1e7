"""Reference of delayed gradients: the whole network at weights of mixed age."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from fdg_jax.engine.arguments import optimizers_of
from fdg_jax.engine.encoding import message_dtype as message_dtype_of
from fdg_jax.engine.encoding import rounded
from fdg_jax.engine.gradient_rule import GradientRule
from fdg_jax.engine.rules import gradient_rule
from fdg_jax.engine.synthesizer import Synthesizer, SynthesizerState
from fdg_jax.layer import Layer, batch_key, typed_key
from fdg_jax.optim import StageOptimizer
from fdg_jax.reference import local, predicted, reversible
from fdg_jax.reference.changes import Changes
from fdg_jax.reference.result import Result, part_of, reduced, total_of
from fdg_jax.reference.tied import Shared
from fdg_jax.schedule import Schedule
from fdg_jax.shared import plain
from fdg_jax.tie import Tie
from fdg_jax.typing import Key, LossFn, PyTree


def train(
    stages: Sequence[Layer],
    loss_fn: LossFn | Sequence[LossFn | None],
    optimizer: Callable[[int], optax.GradientTransformation | StageOptimizer],
    schedule: Schedule,
    params: Sequence[PyTree],
    model_state: Sequence[PyTree],
    key: Key,
    batches: Sequence[tuple[PyTree, PyTree]],
    gradient: str | GradientRule = "stale",
    synthesizers: Sequence[tuple[Synthesizer, SynthesizerState]] = (),
    message_dtype: DTypeLike | None = None,
    tie: Tie | None = None,
) -> Result:
    """Trains on ``batches`` with ``schedule``, from fill to drain.

    Args:
      stages: K layers, input first.
      loss_fn: ``loss_fn(outputs, labels) -> (mean loss, dict of metrics)``, or ``((sum, weight),
        dict of metrics)``; or one for every stage.
      optimizer: ``optimizer(k)`` for stage k.
      schedule: a schedule for K stages.
      params, model_state: initial values, one pytree per stage.
      key: the root key of dropout.
      batches: pairs (inputs, labels).
      gradient: as in `fdg_jax.Pipeline`; "stale" and "recompute_stale" give the same gradient. Of
        rules that estimate weights, only `fdg_jax.engine.reconstruct.Reconstruct`.
      synthesizers: synthesizers of the stages that predict, and their initial states.
      message_dtype, tie: as in `fdg_jax.Pipeline`.

    Returns:
      A `Result`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from fdg_jax import Layer, schedule
      >>> scale = Layer(None, lambda p, s, x, *, train, key: (p * x, s))
      >>> one, batch = jnp.ones(()), (jnp.ones((1, 1)), jnp.zeros((1, 1)))
      >>> run = train([scale, scale], lambda y, t: (jnp.mean((y - t) ** 2) / 2, {}),
      ...             lambda k: optax.sgd(0.1), schedule.fdg(2), [one, one], [(), ()],
      ...             jax.random.key(0), [batch])
      >>> [round(float(w), 6) for w in run.params]
      [0.9, 0.9]

    References:
      Zhuang et al., arXiv 1906.09108, the delayed-gradient recursion.
    """
    stages = tuple(stages)
    rule, kinds = gradient_rule(gradient), schedule.kind_of
    narrow = message_dtype_of(message_dtype)
    if schedule.microbatches == 1:
        batches = [plain(batch) for batch in batches]
    rest = optimizer, schedule, params, model_state, key, batches, narrow
    if not callable(loss_fn) and len(schedule.losses) > 1:
        return local.train(stages, loss_fn, *rest)
    final = loss_fn if callable(loss_fn) else loss_fn[-1]
    assert final is not None
    if schedule.predicts:
        return predicted.train(stages, final, rule, synthesizers, *rest)
    if rule.reconstructs:
        return reversible.train(stages, final, *rest)
    last, count = len(stages) - 1, schedule.microbatches
    key = typed_key(key)
    places = [sum(stage.size for stage in stages[:k]) for k in range(len(stages))]
    placed = [stage.at(place) for stage, place in zip(stages, places, strict=True)]

    shared = Shared(stages, tie)

    @jax.jit
    def network(
        params: tuple[PyTree, ...],
        lent: jax.Array | None,
        state: tuple[PyTree, ...],
        n: int,
        x: PyTree,
        labels: PyTree,
        pins: list[PyTree] | None = None,
    ) -> tuple[tuple[jax.Array, tuple[Any, ...]], tuple[Any, Any]]:
        """Loss, inputs and new states of all stages, the weight of the loss, and the gradients with
        respect to all params and to the tied array in its second use.

        With pins, every stage gets the pinned value, and gradients pass as if it were not pinned.
        """

        def loss(
            params: tuple[PyTree, ...], lent: jax.Array | None
        ) -> tuple[jax.Array, tuple[Any, ...]]:
            y, inputs, states = x, [], []
            full = shared.filled(params, lent)
            for k, stage in enumerate(placed):
                if pins is not None:
                    y = jax.tree.map(_pin, y, pins[k])
                inputs.append(y)
                y, left = stage.apply(full[k], state[k], y, train=True, key=batch_key(key, n))
                y = rounded(y, narrow if k < last else None)
                states.append(left)
            total, weight = total_of(final(y, labels), count)
            return total, (inputs, states, weight)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, lent)

    optimizers = optimizers_of(optimizer, stages)
    versions = [[p] for p in params]
    opt_states = [opt.init(p) for opt, p in zip(optimizers, params, strict=True)]
    state = tuple(model_state)
    changes = Changes(rule, schedule, params)
    losses: list[list[tuple[jax.Array, Any]]] = [[] for _ in batches]
    seen: dict[tuple[int, int], int] = {}  # (stage, micro-batch) -> version of its forward
    used: dict[tuple[int, int], PyTree] = {}  # -> weights of its forward, then of its backward
    lent: dict[int, jax.Array | None] = {}  # micro-batch -> the tied array of its forward
    met: dict[int, tuple[Any, ...]] = {}  # micro-batch -> state, inputs, weight, gradient
    back: dict[int, jax.Array] = {}  # micro-batch -> gradient of the second use of the tied array
    due: list[list[tuple[PyTree, Any]]] = [[] for _ in stages]
    extra: list[dict[str, Any]] = [{} for _ in stages]  # extra arguments, of the last gradient

    for action in (a for tick in schedule.stream(len(batches)) for a in tick):
        k, n = action.stage, action.batch * count + (action.micro or 0)
        kind = kinds[action.kind]
        if kind.in_flight == "opens":
            x, labels = part_of(batches[action.batch], action.micro or 0, count)
            seen[k, n] = len(versions[k]) - 1 if action.version is None else action.version
            used[k, n] = versions[k][seen[k, n]]
            if k == last:
                mixed = tuple(used[j, n] for j in range(len(stages)))
                array = shared.array(used.get((shared.owner, n)))
                (loss, (inputs, left, weight)), whole = network(mixed, array, state, n, x, labels)
                lent[n] = array
                met[n], state = (state, inputs, weight, whole), tuple(left)
                losses[action.batch].append((loss, weight))
        elif kind.gradient == "adds":
            x, labels = part_of(batches[action.batch], action.micro or 0, count)
            old_state, inputs, weight, whole = met[n]
            ago = len(versions[k]) - 1 - seen[k, n]
            if not rule.keeps_weights:
                # Stages above k have done their backward of this batch, at weights now in `used`.
                ago = ago if k in changes.gammas else 0
                used[k, n] = changes.ago(k, versions[k][-1], ago)
                mixed = tuple(used[j, n] for j in range(len(stages)))
                _, whole = network(mixed, lent[n], old_state, n, x, labels, inputs)
            extra[k] = {"stale_params": used[k, n], "staleness": jnp.float32(ago)}
            part = whole[0][k]
            if k == shared.user:
                back[n] = whole[1]
            if k == shared.owner and shared.owner != shared.user:
                part = shared.sum(part, back.get(n, whole[1]))
            if (first := optimizers[k].per_gradient) is not None:
                own = opt_states[k]
                part, kept = first.update(part, own[0], versions[k][-1], **extra[k])
                opt_states[k] = (kept, own[1])
            due[k].append((part, weight))
        elif kind.gradient == "applies":
            mean = reduced(due[k], schedule.reduction == "mean")
            more = extra[k] if len(due[k]) == 1 else {}
            due[k] = []
            now = versions[k][-1]
            updates, opt_states[k] = optimizers[k].update(mean, opt_states[k], now, **more)
            versions[k].append(optax.apply_updates(now, updates))
            changes.add(k, now, versions[k][-1])
    return Result([v[-1] for v in versions], list(state), [reduced(parts) for parts in losses])


def _pin(y: jax.Array, value: jax.Array) -> jax.Array:
    """An array with the value of ``value`` and the gradient of ``y``."""
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return value
    return y - jax.lax.stop_gradient(y) + value
