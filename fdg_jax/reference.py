"""The oracle: training with delayed gradients, written from the equations.

With :math:`w_k^{(v)}` the weights of stage k after v updates and :math:`v_k(n)` the number of
updates that stage k had made when it forwarded batch n, the gradient of batch n is the ordinary
gradient of the *whole* network at a tuple of weights of mixed age,

.. math::
    g(n) = \\nabla L_n\\left(w_0^{(v_0(n))}, \\dots, w_{K-1}^{(v_{K-1}(n))}\\right),

and stage k's update number v applies the mean of its parts of the gradients that are due,

.. math::
    w_k^{(v+1)} = w_k^{(v)} + U_k\\left(\\tfrac{1}{|D|} \\textstyle\\sum_{n \\in D} g_k(n)\\right).

Nothing here is fast, and nothing is shared with the pipeline but the layers and the action stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax

from fdg_jax.layer import Key, Layer, LossFn, PyTree, batch_key, chain, typed_key
from fdg_jax.schedule import Schedule


class Result(NamedTuple):
    """What a reference run gives.

    Attributes:
      params: final parameters, one pytree per stage.
      model_state: final model state, one pytree per stage.
      losses: one per batch, in order.
    """

    params: list[PyTree]
    model_state: list[PyTree]
    losses: list[jax.Array]


def train(
    stages: Sequence[Layer],
    loss_fn: LossFn,
    optimizer: Callable[[int], optax.GradientTransformation],
    schedule: Schedule,
    params: Sequence[PyTree],
    model_state: Sequence[PyTree],
    key: Key,
    batches: Sequence[tuple[PyTree, PyTree]],
) -> Result:
    """Trains on ``batches`` as ``schedule`` says, from the fill to the drain, exactly.

    Args:
      stages: K layers, input first.
      loss_fn: ``loss_fn(outputs, labels) -> (mean loss, dict of metrics)``.
      optimizer: ``optimizer(k)`` for stage k.
      schedule: for K stages.
      params, model_state: initial, one pytree per stage.
      key: the root key of dropout.
      batches: (inputs, labels) each.

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
    network = chain(stages)
    key = typed_key(key)

    @jax.jit
    def gradient(
        params: tuple[PyTree, ...], state: tuple[PyTree, ...], n: int, x: PyTree, labels: PyTree
    ) -> tuple[tuple[jax.Array, tuple[PyTree, ...]], tuple[PyTree, ...]]:
        def loss(params: tuple[PyTree, ...]) -> tuple[jax.Array, tuple[PyTree, ...]]:
            y, new_state = network.apply(params, state, x, train=True, key=batch_key(key, n))
            return loss_fn(y, labels)[0], new_state

        return jax.value_and_grad(loss, has_aux=True)(params)

    optimizers = [optimizer(k) for k in range(len(stages))]
    versions = [[p] for p in params]
    opt_states = [opt.init(p) for opt, p in zip(optimizers, params, strict=True)]
    state = tuple(model_state)
    losses: list[jax.Array] = []
    seen: dict[tuple[int, int], int] = {}  # (stage, batch) -> version at the forward
    gradients: dict[int, tuple[PyTree, ...]] = {}  # batch -> gradient of the whole network
    due: list[list[PyTree]] = [[] for _ in stages]

    for action in (a for tick in schedule.stream(len(batches)) for a in tick):
        k, n = action.stage, action.batch
        if action.kind == "F":
            seen[k, n] = len(versions[k]) - 1
            if k == len(stages) - 1:
                mixed = tuple(versions[j][seen[j, n]] for j in range(len(stages)))
                (loss, state), gradients[n] = gradient(mixed, state, n, *batches[n])
                losses.append(loss)
        elif action.kind == "B":
            due[k].append(gradients[n][k])
        else:
            mean = jax.tree.map(lambda *g: sum(g) / len(g), *due[k])
            due[k] = []
            updates, opt_states[k] = optimizers[k].update(mean, opt_states[k], versions[k][-1])
            versions[k].append(optax.apply_updates(versions[k][-1], updates))
    return Result([v[-1] for v in versions], list(state), losses)
