"""The networks of the papers, each as a list of layers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from fdg_jax.layer import Layer
from fdg_jax.models.auxiliary import auxiliary_head
from fdg_jax.models.compute import DEFAULT, Compute
from fdg_jax.models.conv import conv2d
from fdg_jax.models.norm import batch_norm, relu
from fdg_jax.models.plain import plain
from fdg_jax.models.resnet import resnet, small_resnet, thin_resnet, wide_resnet
from fdg_jax.models.revnet import revnet, small_revnet
from fdg_jax.models.synthesizer import synthesizer

THIN_DEPTHS = (20, 32, 44, 56, 110, 1202)
DEPTHS = (18, 34, 50, 101)
REVERSIBLE_DEPTHS = (18, 34, 50)


def create(
    name: str,
    num_classes: int = 10,
    channels: int = 3,
    unroll: bool | None = None,
    compute: Compute = DEFAULT,
    dropout: float = 0.0,
) -> list[Layer]:
    """Creates a network by name.

    Args:
      name: "small_resnet"; "resnet20", 32, 44, 56, 110, 1202 (thin); "resnet18", 34, 50, 101;
        "plain16"; "wrn28_10" and any other "wrn<6n+4>_<k>"; reversible: "small_revnet",
        "revnet18", 34, 50.
      num_classes: size of the output.
      channels: channels of the images.
      unroll: whether equal blocks are unrolled or scanned, see `fdg_jax.repeat`.
      compute: dtype of activations, and whether the models' own derivatives are used.
      dropout: rate in the blocks of a wide ResNet, in [0, 1); the others have no dropout.

    Returns:
      Layers, input first.

    Raises:
      ValueError: unknown network, or a dropout rate for a network without dropout.

    Example:
      >>> len(create("wrn28_10", num_classes=100))
      8
    """
    options: dict[str, Any] = {"unroll": unroll, "compute": compute}
    makers: dict[str, Callable[..., list[Layer]]] = {
        **{f"resnet{d}": functools.partial(thin_resnet, d, **options) for d in THIN_DEPTHS},
        **{f"resnet{d}": functools.partial(resnet, d, **options) for d in DEPTHS},
        "small_resnet": functools.partial(small_resnet, compute=compute),
        "plain16": functools.partial(plain, 16, **options),
        "small_revnet": functools.partial(small_revnet, compute=compute),
        **{f"revnet{d}": functools.partial(revnet, d, **options) for d in REVERSIBLE_DEPTHS},
    }
    if wide := re.fullmatch(r"wrn(\d{1,4})_(\d{1,3})", name):
        depth, widen = map(int, wide.groups())
        return wide_resnet(depth, widen, num_classes, channels, dropout=dropout, **options)
    if name not in makers:
        raise ValueError(f"model={name!r}: allowed are {', '.join(makers)}, wrn28_10 (wrn<d>_<k>)")
    if dropout:
        raise ValueError(
            f"dropout={dropout:g}: {name} has none; give 0, or a wide ResNet such as wrn28_10"
        )
    return makers[name](num_classes=num_classes, channels=channels)


__all__ = [
    "Compute",
    "auxiliary_head",
    "batch_norm",
    "conv2d",
    "create",
    "plain",
    "relu",
    "resnet",
    "revnet",
    "small_resnet",
    "small_revnet",
    "synthesizer",
    "thin_resnet",
    "wide_resnet",
]
