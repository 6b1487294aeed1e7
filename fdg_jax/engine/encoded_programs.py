"""A stage's functions for low-precision messages: decode first, encode last.

    inputs ──► decode ──► forward ──► encode ──► output
    message ──► decode ──► backward ──► encode ──► message

A batch in flight stores its encoded input; the backward decodes it again. Gradients are those with
respect to decoded values, which is straight-through estimation of the rounding. A synthesizer gets
the decoded output, as the next stage does.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from fdg_jax.engine.encoding import decode, encode
from fdg_jax.engine.programs import Functions
from fdg_jax.engine.residuals import Stash
from fdg_jax.engine.synthesizer import Output, SynthesizerState
from fdg_jax.typing import Key, PyTree


class EncodedFunctions(Functions):
    """`Functions` with encoded messages.

    Attributes:
      message_dtype: dtype of the numbers sent; None: messages are not encoded.
    """

    message_dtype: np.dtype | None = None

    def sent(self, tree: PyTree) -> PyTree:
        """Shapes, dtypes and placement of a message to this stage.

        Args:
          tree: shapes and dtypes of its contents before encoding.
        """
        shapes = jax.eval_shape(lambda v: encode(v, self.message_dtype), tree)

        def one(leaf: jax.ShapeDtypeStruct, place: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return jax.tree.map(one, shapes, self.places(shapes))

    def _linearise(
        self,
        params: PyTree,
        model_state: PyTree,
        inputs: PyTree,
        labels: PyTree,
        key: Key,
        number: jax.Array,
        guarded: bool = False,
    ) -> Any:
        given = (params, model_state, decode(inputs), labels, key, number, guarded)
        y, *rest = super()._linearise(*given)
        return self._encoded(y), *rest

    def _backward(
        self, params: PyTree, stash: Stash, key: Key, message: PyTree
    ) -> tuple[PyTree, PyTree]:
        stash = stash._replace(inputs=decode(stash.inputs))
        gradient, down = super()._backward(params, stash, key, decode(message))
        return gradient, self._encoded(down)

    def _predict(
        self, params: PyTree, state: PyTree, own: Output, key: Key
    ) -> tuple[list[jax.Array]]:
        return super()._predict(params, state, decode(own), key)

    def _teach(
        self, synthesizer: SynthesizerState, own: Output, key: Key, cotangent: PyTree
    ) -> tuple[SynthesizerState, jax.Array]:
        return super()._teach(synthesizer, decode(own), key, decode(cotangent))

    def _encoded(self, tree: PyTree) -> PyTree:
        if self.message_dtype is None:
            return tree
        return self._over_batch(encode(tree, self.message_dtype))
