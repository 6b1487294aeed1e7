"""Layers and chains of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fdg_jax.layer_check import check_layers, naming, pair_of
from fdg_jax.typing import Key, PyTree

# Folded into the root key, so that dropout keys differ from the keys of `init`.
_NOISE = 0x6E6F6973


def batch_key(root: Key, batch: int | jax.Array) -> Key:
    """The key of one mini-batch; every layer folds in its own number.

    Args:
      root: the run's key, typed (``jax.random.key``).
      batch: number of the mini-batch since the start of the run, int32.

    Returns:
      A key that depends on neither the number of stages nor the schedule.
    """
    return jax.random.fold_in(jax.random.fold_in(root, _NOISE), batch)


def typed_key(key: Key) -> Key:
    """A typed key from either form of JAX (``jax.random.key`` or ``PRNGKey``).

    Raises:
      TypeError: it is not a key.
    """
    if not hasattr(key, "dtype"):
        raise TypeError(f"key={key!r}: is no JAX key; give jax.random.key(seed)")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if (not typed and key.dtype != jnp.uint32) or key.ndim != (0 if typed else 1):
        raise TypeError(
            f"key: is {key.dtype}{list(key.shape)}, not one JAX key; give jax.random.key(seed)"
        )
    if typed:
        return key
    return jax.random.wrap_key_data(key)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros of the shapes and dtypes of ``tree``, whose leaves may be abstract."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def output_of(layer: Layer, params: PyTree, state: PyTree, x: PyTree) -> PyTree:
    """Shapes and dtypes of a layer's output; computes nothing."""
    return jax.eval_shape(
        lambda p, s, v: layer.apply(p, s, v, train=False, key=None)[0], params, state, x
    )


@dataclass(frozen=True)
class Layer:
    """One layer: a pair of pure functions.

    Args:
      init: ``init(key, x) -> (params, state)``; ``x`` is an example input of the right shapes and
        dtypes. ``state`` is updated by the forward but not trained (batch statistics); ``()`` if
        there is none.
      apply: ``apply(params, state, x, *, train, key) -> (y, state)``; ``x`` and ``y`` are arrays or
        pytrees of arrays, batch axis first. ``key`` is None in evaluation. The shapes of ``y`` must
        not depend on ``train``.
      inverse: ``inverse(params, state, y, *, train, key) -> x`` for invertible layers, else None.
      reverse: ``reverse(params, state, y, cotangent, *, key) -> (x, gradient, cotangent of x)``:
        `inverse` and the derivative of `apply` combined, in training. None: derived from both.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> scale = Layer(
      ...     init=lambda key, x: (jnp.ones(x.shape[-1]), ()),
      ...     apply=lambda params, state, x, *, train, key: (params * x, state),
      ... )
      >>> params, state = scale.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> scale.apply(params, state, jnp.ones((2, 3)), train=True, key=None)[0].shape
      (2, 3)
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[PyTree, PyTree]]
    inverse: Callable[..., PyTree] | None = None
    reverse: Callable[..., tuple[PyTree, PyTree, PyTree]] | None = None

    def __post_init__(self) -> None:
        if self.inverse is not None and self.reverse is None:
            object.__setattr__(self, "reverse", _reverse_of(self.apply, self.inverse))

    @property
    def size(self) -> int:
        """The number of layers this counts as in the numbering of a network."""
        return 1

    def scores(
        self, params: PyTree, state: PyTree, y: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        """The input of a loss: the output, unless the layer has its own head.

        Args:
          params, state, train, key: as in ``apply``.
          y: output of ``apply``.

        Returns:
          The first argument of the loss function, and the new state.
        """
        del params, train, key
        return y, state

    def key_at(self, key: Key, index: int | jax.Array) -> Key:
        """The key that layer number ``index`` gets from `at`.

        Args:
          key: the key of the whole network.
          index: the number of the layer.
        """
        return jax.random.fold_in(key, index)

    def at(self, index: int | jax.Array) -> Layer:
        """This layer as number ``index`` of a network: it folds that number into every key.

        Initial weights and dropout noise then depend on a layer's position in the network, not on
        how the network is cut into stages.
        """

        def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
            with naming(index, x):
                made = self.init(self.key_at(key, index), x)
            return pair_of(index, "init must return (params, state)", made)

        def apply(
            params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
        ) -> tuple[PyTree, PyTree]:
            with naming(index, x):
                made = self.apply(params, state, x, train=train, key=folded(key))
            return pair_of(index, "apply must return (y, state)", made)

        def inverse(
            params: PyTree, state: PyTree, y: PyTree, *, train: bool, key: Key | None
        ) -> PyTree:
            assert self.inverse is not None
            return self.inverse(params, state, y, train=train, key=folded(key))

        def reverse(
            params: PyTree, state: PyTree, y: PyTree, cotangent: PyTree, *, key: Key | None
        ) -> tuple[PyTree, PyTree, PyTree]:
            assert self.reverse is not None
            return self.reverse(params, state, y, cotangent, key=folded(key))

        def folded(key: Key | None) -> Key | None:
            return None if key is None else self.key_at(key, index)

        if self.inverse is None:
            return Layer(init, apply)
        return Layer(init, apply, inverse, reverse)


def _reverse_of(
    apply: Callable[..., tuple[PyTree, PyTree]], inverse: Callable[..., PyTree]
) -> Callable[..., tuple[PyTree, PyTree, PyTree]]:
    """`Layer.reverse` for a layer with only an inverse: evaluates the layer twice."""

    def reverse(
        params: PyTree, state: PyTree, y: PyTree, cotangent: PyTree, *, key: Key | None
    ) -> tuple[PyTree, PyTree, PyTree]:
        x = inverse(params, state, y, train=True, key=key)
        _, vjp = jax.vjp(lambda p, v: apply(p, state, v, train=True, key=key)[0], params, x)
        return x, *vjp(cotangent)

    return reverse


@dataclass(frozen=True)
class Chain(Layer):
    """A sequence of layers; made by `chain`."""

    layers: tuple[Layer, ...] = ()
    first: int | jax.Array = 0

    def __repr__(self) -> str:
        return f"<Chain of {self.size} layers>"

    @property
    def numbered(self) -> list[Layer]:
        """The layers, each with its number in the network."""
        placed, index = [], self.first
        for layer in self.layers:
            placed.append(layer.at(index))
            index = index + layer.size
        return placed

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers)

    def at(self, index: int | jax.Array) -> Layer:
        return chain(self.layers, first=index)


def chain(layers: Sequence[Layer], *, first: int | jax.Array = 0) -> Layer:
    """Chains layers into one layer.

    Args:
      layers: at least one layer.
      first: the number of the first layer in the whole network.

    Returns:
      A layer whose params and state are tuples in the order of the layers.

    Raises:
      ValueError: no layers, or an element that is not a layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fdg_jax import from_fn
      >>> net = chain([from_fn(jnp.tanh), from_fn(lambda x: 2 * x)])
      >>> y, state = net.apply(((), ()), ((), ()), jnp.zeros(3), train=False, key=None)
      >>> y.shape, state
      ((3,), ((), ()))
    """
    layers = tuple(check_layers(layers))
    if not layers:
        raise ValueError("layers=[]: a chain needs at least one layer")
    placed = Chain(layers[0].init, layers[0].apply, layers=layers, first=first).numbered

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        params, state = [], []
        for layer in placed:
            layer_params, layer_state = layer.init(key, x)
            params.append(layer_params)
            state.append(layer_state)
            if len(params) < len(placed):
                x = zeros_like(output_of(layer, layer_params, layer_state, x))
        return tuple(params), tuple(state)

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        new_state = []
        for layer, layer_params, layer_state in zip(placed, params, state, strict=True):
            x, layer_state = layer.apply(layer_params, layer_state, x, train=train, key=key)
            new_state.append(layer_state)
        return x, tuple(new_state)

    def inverse(
        params: PyTree, state: PyTree, y: PyTree, *, train: bool, key: Key | None
    ) -> PyTree:
        for layer, p, s in reversed(list(zip(placed, params, state, strict=True))):
            assert layer.inverse is not None
            y = layer.inverse(p, s, y, train=train, key=key)
        return y

    def reverse(
        params: PyTree, state: PyTree, y: PyTree, cotangent: PyTree, *, key: Key | None
    ) -> tuple[PyTree, PyTree, PyTree]:
        gradients = []
        for layer, p, s in reversed(list(zip(placed, params, state, strict=True))):
            assert layer.reverse is not None
            y, gradient, cotangent = layer.reverse(p, s, y, cotangent, key=key)
            gradients.append(gradient)
        return y, tuple(reversed(gradients)), cotangent

    if any(layer.inverse is None for layer in layers):
        return Chain(init, apply, layers=layers, first=first)
    return Chain(init, apply, inverse, reverse, layers, first)
