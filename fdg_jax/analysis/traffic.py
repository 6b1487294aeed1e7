"""Sizes of the messages of a pipeline, from shapes only."""

from __future__ import annotations

from typing import NamedTuple

import jax

from fdg_jax.analysis.stage_bytes import nbytes
from fdg_jax.engine.pipeline import Pipeline
from fdg_jax.engine.residuals import split_inexact
from fdg_jax.engine.template import part_of
from fdg_jax.layer import output_of
from fdg_jax.typing import PyTree


class MessageBytes(NamedTuple):
    """Bytes of one mini-batch's messages, summed over its micro-batches.

    Attributes:
      inputs: input of each stage; for stage 0 the mini-batch itself.
      cotangents: message of each stage to the previous one; 0 if there is none.
    """

    inputs: tuple[int, ...]
    cotangents: tuple[int, ...]


def message_bytes(pipe: Pipeline, example: tuple[PyTree, PyTree]) -> MessageBytes:
    """Sizes of the messages between the stages of a pipeline; computes nothing.

    These are ``input_bytes`` and ``cotangent_bytes`` of `Costs`.

    Args:
      pipe: the pipeline; its ``message_dtype`` is taken into account.
      example: a batch ``(inputs, labels)``; only shapes and dtypes are used.

    Returns:
      Bytes by stage.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import fdg_jax as fdg
      >>> layers = [fdg.from_fn(jnp.tanh)] * 2
      >>> batch = jnp.ones((8, 3), jnp.float32), jnp.zeros((8, 3))
      >>> for dtype in (None, jnp.bfloat16, jnp.int8):
      ...     pipe = fdg.Pipeline(layers, lambda y, t: (jnp.mean((y - t) ** 2), {}),
      ...                         optax.sgd(0.1), fdg.schedule.fdg(2), message_dtype=dtype)
      ...     print(message_bytes(pipe, batch))
      MessageBytes(inputs=(96, 96), cotangents=(0, 96))
      MessageBytes(inputs=(96, 48), cotangents=(0, 48))
      MessageBytes(inputs=(96, 36), cotangents=(0, 36))
    """
    parts = pipe.schedule.microbatches
    x, _ = part_of(example, parts)
    inputs, cotangents = [], []
    for k, stage in enumerate(pipe.stages):
        params, model_state, _ = stage.shapes(x)
        inputs.append(parts * nbytes(stage.sent(x) if k else x))
        moving = jax.eval_shape(lambda v: split_inexact(v)[0], x)
        down = stage.sent(jax.eval_shape(stage.rule.message, x, moving)) if stage.sends else ()
        cotangents.append(parts * nbytes(down))
        x = output_of(stage.layer, params, model_state, x)
    return MessageBytes(tuple(inputs), tuple(cotangents))
