"""Tied weights: an array owned by one layer and used by another, possibly in another stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax

from fdg_jax.typing import PyTree


@dataclass(frozen=True)
class Tie:
    """A tied array: its owner and its other use; made by `tie`."""

    owner: int
    user: int
    name: str | None = None
    user_name: str | None = None
    transpose: bool = False


def tie(
    owner: int,
    user: int,
    name: str | None = None,
    user_name: str | None = None,
    *,
    transpose: bool = False,
) -> Tie:
    r"""Ties an array of a layer to one of a later layer, such as an embedding to the output layer.

    .. math::
        g_o(n) = \left.\frac{\partial L_n}{\partial w_o} + \frac{\partial L_n}{\partial w_u}
        \right|_{w_o = w_u = w_o^{(v_o(n))}}

    The array lives in the owner's stage, and its optimizer is that stage's. With the forward of
    mini-batch n the stage sends the array, as that forward used it, to the user's stage, whose
    backward of n sends the gradient back: two more messages, and no wait. So both uses of a
    mini-batch see one version of the array, and both parts of its gradient are as late as all else
    in the owner's stage: 2(K-1-k) updates with FDG. Without staleness it is ordinary tying. Waiting
    copies, in FDG and from the first stage to the last: K-1 of the array, K-1 of its gradient.

    Args:
      owner: number of the layer that has the array, in the whole network; the layers of a
        `fdg_jax.repeat` count, but none of them may be named.
      user: number of the layer that uses it; greater.
      name: path of the array in the owner's params, such as "embedding" or "token/kernel". None:
        its only array.
      user_name: the same in the user's params; what its init makes there is not kept.
      transpose: whether the user has the array transposed.

    Returns:
      What `fdg_jax.Pipeline(tie=...)` takes.

    Raises:
      ValueError: the layers are not in this order.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import fdg_jax as fdg
      >>> layers = [fdg.Layer(lambda key, x: ({"w": jnp.full((), 2.0)}, ()),
      ...                     lambda p, s, x, *, train, key: (p["w"] * x, s)) for _ in range(2)]
      >>> pipe = fdg.Pipeline(layers, lambda y, t: (jnp.mean((y - t) ** 2), {}), optax.sgd(0.01),
      ...                     fdg.schedule.fdg(2), tie=fdg.tie(0, 1, "w", "w"))
      >>> state = pipe.init(jax.random.key(0), jnp.ones((4, 1)))
      >>> state, _ = pipe.step(state, (jnp.ones((4, 1)), jnp.zeros((4, 1))))
      >>> state, _ = pipe.drain(state)
      >>> round(float(pipe.params(state)[0]["w"]), 6)  # 2 - 0.01 * d(w ** 4)/dw
      1.68

    References:
      Press, Wolf: `Using the Output Embedding to Improve Language Models
      <https://arxiv.org/abs/1608.05859>`_, 2017.
    """
    if not 0 <= owner < user:
        raise ValueError(
            f"tie: owner={owner}, user={user}; the owner comes first, since its forward sends the "
            "array"
        )
    return Tie(owner, user, name, user_name, transpose)


class Borrowed(NamedTuple):
    """Replaces an array owned by another layer. A pytree without arrays."""


class TiedArray(NamedTuple):
    """A tied array, or its gradient, on its way: whole on every device of a stage, never rounded.

    Attributes:
      array: as its owner has it.
    """

    array: jax.Array


class Paired(NamedTuple):
    """An input or a message together with the tied array of its mini-batch.

    Attributes:
      value: the input, or the message.
      tied: see `TiedArray`.
    """

    value: PyTree
    tied: TiedArray


def value_of(x: PyTree) -> PyTree:
    """An input or a message without the tied array."""
    return x.value if isinstance(x, Paired) else x
