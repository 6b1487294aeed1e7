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

    The array lives in the owner's stage and is updated by its optimizer. With the forward of
    mini-batch n the owner sends the version used by this forward to the user's stage, whose
    backward of n returns the gradient. These are two additional messages; no stage waits for them.
    Both uses of a mini-batch therefore see the same version, and both parts of the gradient have
    the staleness of the owner's stage: 2(K-1-k) updates with FDG. Without staleness it is ordinary
    tying. With FDG, K-1 copies of the array and K-1 of its gradient are in flight between the first
    and the last stage.

    Args:
      owner: number of the layer that owns the array, counted through the whole network, including
        the layers of a `fdg_jax.repeat`, which cannot be tied themselves.
      user: number of the later layer that uses it.
      name: path of the array in the owner's params, such as "embedding" or "token/kernel". None:
        its only array.
      user_name: the same in the user's params; the initial value there is discarded.
      transpose: whether the user uses the transposed array.

    Returns:
      The argument of `fdg_jax.Pipeline(tie=...)`.

    Raises:
      ValueError: owner is not before user.

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
    """A tied array or its gradient as a message, replicated on devices and not converted.

    Attributes:
      array: the array, in the owner's layout.
    """

    array: jax.Array


class Paired(NamedTuple):
    """An input or a message together with the tied array of its mini-batch.

    Attributes:
      value: the input or the message.
      tied: the tied array.
    """

    value: PyTree
    tied: TiedArray


def value_of(x: PyTree) -> PyTree:
    """An input or a message without the tied array."""
    return x.value if isinstance(x, Paired) else x
