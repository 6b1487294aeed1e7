"""Adam in the eigenbasis of the gradient's second moment."""

from __future__ import annotations

import functools
import math
import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.optim.staleness import checked_number


class BasisRotationState(NamedTuple):
    """State of `scale_by_basis_rotation`; unused fields of a leaf are scalar zeros.

    Attributes:
      count: number of updates so far, int32.
      mu: first moments, not rotated.
      nu: second moments, in the rotated basis.
      left, right: averages of G G' and G' G of every matrix.
      left_basis, right_basis: their approximate eigenvectors, in columns.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name for it
    mu: optax.Updates
    nu: optax.Updates
    left: optax.Updates
    right: optax.Updates
    left_basis: optax.Updates
    right_basis: optax.Updates


def scale_by_basis_rotation(
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    every: int = 10,
    sides: Literal["one", "both"] = "one",
    include: str = "",
) -> optax.GradientTransformation:
    r"""Adam in the eigenbasis of each matrix's gradients; the first moment is not rotated.

    .. math::
        L &\leftarrow b_2 L + (1 - b_2) G G^\top, \qquad Q_L \approx \mathrm{eigenvectors}(L) \\
        M &\leftarrow b_1 M + (1 - b_1) G, \qquad
        V \leftarrow b_2 V + (1 - b_2) (Q_L^\top G Q_R)^{2} \\
        U &= Q_L \, \frac{\hat{Q_L^\top M Q_R}}{\sqrt{\hat V} + \epsilon} \, Q_R^\top

    with R, :math:`Q_R` of :math:`G^\top G` likewise, and hats for Adam's bias corrections. The
    basis is computed by `jnp.linalg.eigh` at the first update and refined by one power iteration
    and a QR decomposition every ``every`` updates. In it a stale gradient only disturbs its own
    direction, whereas in the basis of the weights one sharp direction disturbs all.

    Replaces `optax.scale_by_adam`, before decay and rate. The last two axes of an array are a
    matrix; axes before them (blocks stacked by `fdg_jax.repeat`, a convolution's window) are
    batched. Other arrays get Adam. For gradients of ``gradient="stale"``. As with Adam, a constant
    factor before it cancels: `fdg_shrink` goes after it, clipping before it. Memory: Adam's, plus
    twice m x m for a matrix of m x n, m <= n; with ``sides="both"`` also twice n x n. Averages and
    bases have at least single precision.

    Args:
      b1, b2: decay of the first and of the other moments, in [0, 1).
      eps: added to the denominator, > 0.
      every: updates between two refinements of the basis, >= 1.
      sides: "one" rotates only the shorter side of a matrix, "both" rotates both.
      include: a regular expression, searched in an array's path; matching arrays are rotated, all
        if it is empty. "kernel" excludes biases stacked by `fdg_jax.repeat`, which are no matrices.

    Returns:
      A transformation.

    Raises:
      ValueError: a number out of bounds, or another value of ``sides``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(scale_by_basis_rotation(b1=0.98), optax.scale(-0.004))
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> print(updates["bias"])
      [-0.004 -0.004 -0.004]

    References:
      `Basis rotation for asynchronous pipelines, arXiv 2602.03515
      <https://arxiv.org/abs/2602.03515>`_, 2026; Vyas et al., `SOAP
      <https://arxiv.org/abs/2409.11321>`_, 2024, whose first moment is rotated with the basis.
    """
    checked_number("b1", b1, 0, 1, "0.9 is usual, 0.98 where gradients are late")
    checked_number("b2", b2, 0, 1, "0.95 is usual")
    checked_number("eps", eps, math.ulp(0.0), 1, "1e-8 is usual")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every}: must be a number of updates >= 1; 10 is usual")
    if sides not in ("one", "both"):
        raise ValueError(f"sides={sides!r}: allowed are 'one' and 'both'")

    wanted = re.compile(include)

    def rotated(path: jax.tree_util.KeyPath, leaf: jax.Array) -> tuple[bool, bool]:
        """Whether an array is rotated from the left, and from the right."""
        if leaf.ndim < 2 or not wanted.search(jax.tree_util.keystr(path)):
            return False, False
        rows, columns = leaf.shape[-2:]
        return sides == "both" or rows <= columns, sides == "both" or rows > columns

    def square(side: int, path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        if not rotated(path, leaf)[side]:
            return jnp.zeros((), dtype)
        size = leaf.shape[side - 2]
        return jnp.zeros((*leaf.shape[:-2], size, size), dtype)

    def init(params: optax.Params) -> BasisRotationState:
        squares = [
            jax.tree_util.tree_map_with_path(functools.partial(square, side), params)
            for side in (0, 1, 0, 1)
        ]
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return BasisRotationState(jnp.zeros((), jnp.int32), mu, nu, *squares)

    def update(
        updates: optax.Updates, state: BasisRotationState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, BasisRotationState]:
        del params
        count = optax.safe_increment(state.count)
        correct = [1 - jnp.asarray(b, jnp.result_type(float)) ** count for b in (b1, b2)]

        # Change of the basis: 0 none, 1 a power iteration, 2 the first eigenvectors.
        turn = jnp.where(state.count == 0, 2, jnp.where(state.count % every == 0, 1, 0))

        def one(
            path: jax.tree_util.KeyPath,
            gradient: jax.Array,
            mu: jax.Array,
            nu: jax.Array,
            *squares: jax.Array,
        ) -> Any:
            averages, bases, sides = list(squares[:2]), list(squares[2:]), rotated(path, gradient)
            g = gradient.astype(squares[0].dtype)
            for side in (side for side in (0, 1) if sides[side]):
                gram = g @ g.mT if side == 0 else g.mT @ g
                averages[side] = b2 * averages[side] + (1 - b2) * gram
                bases[side], nu = jax.lax.switch(
                    turn,
                    [
                        lambda a, q, v: (q, v),
                        functools.partial(_power_iteration, axis=side - 2),
                        lambda a, q, v: (jnp.flip(jnp.linalg.eigh(a)[1], -1), v),
                    ],
                    *(averages[side], bases[side], nu),
                )
            mu = b1 * mu + (1 - b1) * gradient
            square = jnp.square(_turn(g, bases, sides, back=False))
            nu = b2 * nu + (1 - b2) * square.astype(nu.dtype)
            moved = _turn(mu.astype(g.dtype), bases, sides, back=False) / correct[0].astype(g.dtype)
            step = moved / (jnp.sqrt(nu.astype(g.dtype) / correct[1].astype(g.dtype)) + eps)
            step = _turn(step, bases, sides, back=True).astype(gradient.dtype)
            return step, mu, nu, *averages, *bases

        paths, structure = jax.tree_util.tree_flatten_with_path(updates)
        fields = [jax.tree.leaves(field) for field in state[1:]]
        rows = [one(*leaf, *row) for leaf, *row in zip(paths, *fields, strict=True)]
        found = [jax.tree.unflatten(structure, [row[i] for row in rows]) for i in range(7)]
        return found[0], BasisRotationState(count, *found[1:])

    return optax.GradientTransformation(init, update)


def _power_iteration(
    average: jax.Array, basis: jax.Array, nu: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    """One power iteration of the basis, sorted by eigenvalue; second moments in the same order."""
    size = jnp.einsum("...ij,...ik,...kj->...j", basis, average, basis)
    order = jnp.argsort(-size, axis=-1)
    basis = jnp.take_along_axis(basis, order[..., None, :], -1)
    along = order[..., :, None] if axis == -2 else order[..., None, :]
    nu = jnp.take_along_axis(nu, along, axis)
    return jnp.linalg.qr(average @ basis)[0], nu


def _turn(
    matrix: jax.Array, bases: list[jax.Array], sides: tuple[bool, bool], *, back: bool
) -> jax.Array:
    """Rotates into the basis, or back."""
    if sides[0]:
        matrix = (bases[0] if back else bases[0].mT) @ matrix
    if sides[1]:
        matrix = matrix @ (bases[1].mT if back else bases[1])
    return matrix
