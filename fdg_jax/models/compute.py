"""Numerical settings of the models: dtype and derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compute:
    """Settings that change neither parameters nor, up to rounding, gradients.

    Args:
      dtype: dtype of activations and their cotangents, such as ``jnp.bfloat16``; parameters, batch
        statistics and logits stay float32. None: the promoted dtype of inputs and parameters.
      fast: custom derivatives of convolution (`conv2d`), batch norm and ReLU, which store fewer
        residuals and are faster on CPU; False: those of JAX and XLA.

    Example:
      >>> Compute(fast=False)
      Compute(dtype=None, fast=False)
    """

    dtype: Any = None
    fast: bool = True


DEFAULT = Compute()
