"""A convolution whose weight gradient is computed fast on CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdg_jax.models.compute import DEFAULT, Compute

# A weight gradient is summed over parts of _PART images; with at least _WIDE channels, of _NUMBERS
# numbers of the cotangent, but at least _PART_WIDE images; over at most _PARTS parts. Chosen by
# timing plain16, ResNet-20 and ResNet-56 on two cores: for narrow layers, smaller parts use idle
# cores but take more processor time in total, which a pipeline does not have to spare.
_PART, _WIDE, _NUMBERS, _PART_WIDE, _PARTS = 32, 64, 1 << 16, 4, 16


Pair = tuple[int, int]
Padding = int | str | Sequence[Pair]


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    stride: int | Pair = 1,
    padding: Padding = 0,
    *,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> jax.Array:
    r"""Convolution of images, with a derivative that XLA compiles well for CPUs.

    .. math::
        y_{n,i,j,o} = \sum_{r,s,c} x_{n,\,ti+r-p,\,tj+s-p,\,c} \; w_{r,s,c,o}

    Equals `jax.lax.conv_general_dilated` with ``dimension_numbers=("NHWC", "HWIO", "NHWC")``. On
    CPU, with jax 0.10 and with `batch_norm`, a step of ResNet-20 takes 0.61 to 0.69 of the time of
    XLA's derivatives (BENCHMARKS.md). On other platforms, and with dilation or groups, the
    derivative is XLA's own.

    The weight gradient is a convolution of the input with the output's cotangent, both transposed
    so that the batch becomes the channels. On CPU XLA fuses preceding elementwise operations into a
    transpose: batch norm, ReLU and the additions of a row of residual blocks are recomputed with
    strided reads. Here both arrays pass a branch that is always taken, unknown to the compiler, so
    each is computed once. The gradient is summed over parts of a few images, whose transposes fit
    in a core's cache.

    Args:
      x: images, [N, H, W, C], any floating dtype.
      kernel: w, [R, S, C / groups, O], of the dtype of ``x``.
      stride: t, for both axes or for each.
      padding: p, zeros on every side; "SAME", "VALID", or a pair (before, after) for each axis.
      dilation: dilation of the kernel, for both axes or for each.
      groups: number of groups of channels that are convolved separately.

    Returns:
      y, [N, (H + 2p - R) // t + 1, (W + 2p - S) // t + 1, O] without dilation.

    Raises:
      ValueError: shapes do not match, or the padding is invalid.

    Example:
      >>> conv2d(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), 1, 1).shape
      (1, 4, 4, 5)
      >>> conv2d(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), (2, 1), "SAME").shape
      (1, 2, 4, 5)
    """
    if x.ndim != 4 or kernel.ndim != 4 or kernel.shape[2] * groups != x.shape[3]:
        raise ValueError(
            f"conv2d: x is {list(x.shape)} and kernel {list(kernel.shape)}, groups={groups}; they "
            "must be [N, H, W, C] and [R, S, C / groups, O]"
        )
    strides, dilations = _pair("stride", stride), _pair("dilation", dilation)
    window = [d * (size - 1) + 1 for d, size in zip(dilations, kernel.shape[:2], strict=True)]
    pads = _pads(padding, x.shape[1:3], window, strides)
    if groups == 1 and dilations == (1, 1):
        return _fast(x, kernel, strides, pads)
    return _convolve(x, kernel, strides, pads, dilations, groups)


def _pair(name: str, value: int | Pair) -> Pair:
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or any(not isinstance(n, int) or n < 1 for n in both):
        raise ValueError(f"{name}={value!r}: must be 1 or more, a number or a pair of them")
    return both


def _pads(
    padding: Padding, shape: Sequence[int], window: Sequence[int], strides: Pair
) -> tuple[Pair, Pair]:
    """Zeros before and after the rows, and before and after the columns."""
    if isinstance(padding, int):
        return ((padding, padding),) * 2
    if isinstance(padding, str) and padding.upper() in ("SAME", "VALID"):
        padding = jax.lax.padtype_to_pads(shape, window, strides, padding.upper())
    if len(padding) != 2 or isinstance(padding, str) or any(np.shape(p) != (2,) for p in padding):
        raise ValueError(
            f"padding={padding!r}: must be a number, 'SAME', 'VALID', or two pairs (before, after)"
        )
    (top, bottom), (left, right) = padding
    return (int(top), int(bottom)), (int(left), int(right))


def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    pads: tuple[Pair, Pair],
    dilations: Pair = (1, 1),
    groups: int = 1,
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        rhs_dilation=dilations,
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fast(x: jax.Array, kernel: jax.Array, strides: Pair, pads: tuple[Pair, Pair]) -> jax.Array:
    return _convolve(x, kernel, strides, pads)


def _forward(
    x: jax.Array, kernel: jax.Array, strides: Pair, pads: tuple[Pair, Pair]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel, strides, pads), (x, kernel)


def _backward(
    strides: Pair,
    pads: tuple[Pair, Pair],
    residuals: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals

    def of_kernel(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        transposed = jax.linear_transpose(lambda w: _convolve(x, w, strides, pads), kernel)
        return transposed(cotangent)[0]

    def of_kernel_in_parts(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        size = _PART
        if min(kernel.shape[2:]) >= _WIDE:
            size = max(_NUMBERS // math.prod(cotangent.shape[1:]), _PART_WIDE)
        size = max(size, -(-len(x) // _PARTS))
        parts = [slice(i, i + size) for i in range(0, len(x), size)]
        first, *rest = (of_kernel(x[part], cotangent[part]) for part in parts)
        return sum(rest, first)

    if kernel.shape[:2] == (1, 1):  # a matrix product, without transposes
        by_kernel = of_kernel(x, cotangent)
    else:
        x, cotangent = jax.lax.platform_dependent(
            (x, cotangent), kernel, cpu=_computed_once, default=lambda arrays, _: arrays
        )
        by_kernel = jax.lax.platform_dependent(
            x, cotangent, cpu=of_kernel_in_parts, default=of_kernel
        )
    (by_x,) = jax.linear_transpose(lambda v: _convolve(v, kernel, strides, pads), x)(cotangent)
    return by_x, by_kernel


_fast.defvjp(_forward, _backward)


def _computed_once(arrays: Any, witness: jax.Array) -> Any:
    """``arrays``, protected from recomputation by fusion.

    An optimization barrier would do, but XLA removes those before fusion on CPU.
    """
    number = witness.ravel()[0]  # equal to itself unless the weights are lost (NaN)
    lost = functools.partial(jax.tree.map, lambda v: jnp.full_like(v, jnp.nan))
    return jax.lax.cond(number == number, lambda v: v, lost, arrays)


class Conv(nnx.Module):
    """A square convolution without bias, initialised for ReLU (He et al. 2015).

    Output size is input size / stride.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        stride: int = 1,
        *,
        compute: Compute = DEFAULT,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (size, size, inputs, outputs)
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape, jnp.float32))
        self.stride = stride
        self.padding = size // 2
        self.compute = compute

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        dtype = self.compute.dtype or jnp.result_type(x, kernel)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        if self.compute.fast:
            return conv2d(x, kernel, self.stride, self.padding)
        pads = ((self.padding, self.padding),) * 2
        return _convolve(x, kernel, (self.stride, self.stride), pads)
