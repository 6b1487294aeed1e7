"""Numerical settings of the models: dtype and derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compute:
    """Settings that change neither parameters nor, up to rounding, gradients.

    Args:
      dtype: of activations and their cotangents, such as ``jnp.bfloat16``; parameters, batch
        statistics and logits stay float32. None: what inputs and parameters promote to.
      fast: own derivatives of convolution (`conv2d`), batch norm and ReLU, which keep fewer
        residuals and are faster on CPU; False leaves all of them to JAX and XLA.

    Example:
      >>> Compute(fast=False)
      Compute(dtype=None, fast=False)
    """

    dtype: Any = None
    fast: bool = True


DEFAULT = Compute()
