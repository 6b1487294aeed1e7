"""What a network is made of: layers, chains of layers, repeated layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fdg_jax.typing import Key, PyTree

# Dropout keys come from their own branch of the root key, away from the keys of `init`.
_NOISE = 0x6E6F6973


def batch_key(root: Key, batch: int | jax.Array) -> Key:
    """The key of one mini-batch; every layer folds its own number into it.

    Args:
      root: the run's key, typed (``jax.random.key``).
      batch: number of the mini-batch since the start of the run, int32.

    Returns:
      A key that depends on neither the number of stages nor the schedule.
    """
    return jax.random.fold_in(jax.random.fold_in(root, _NOISE), batch)


def typed_key(key: Key) -> Key:
    """A typed key from either form that JAX knows (``jax.random.key`` or ``PRNGKey``)."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros of the shapes and dtypes of ``tree``, whose leaves may be abstract."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def output_of(layer: Layer, params: PyTree, state: PyTree, x: PyTree) -> PyTree:
    """Shapes and dtypes of a layer's output; nothing is computed."""
    return jax.eval_shape(
        lambda p, s, v: layer.apply(p, s, v, train=False, key=None)[0], params, state, x
    )


@dataclass(frozen=True)
class Layer:
    """One layer: two pure functions.

    Args:
      init: ``init(key, x) -> (params, state)``; ``x`` is an example input of the right shapes and
        dtypes. ``state`` is what changes at the forward and is not trained (batch statistics); use
        ``()`` where there is none.
      apply: ``apply(params, state, x, *, train, key) -> (y, state)``; ``x`` and ``y`` are arrays or
        pytrees of arrays, batch axis first. ``key`` is None in evaluation. Between two layers ``y``
        has the same shapes in training and evaluation.

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

    @property
    def size(self) -> int:
        """How many layers this counts as in the numbering of a whole network."""
        return 1

    def at(self, index: int | jax.Array) -> Layer:
        """This layer as number ``index`` of a network: it folds that number into every key.

        Initial weights and dropout noise then depend on where a layer stands in the network, and
        not on how the network is cut into stages.
        """

        def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
            return self.init(jax.random.fold_in(key, index), x)

        def apply(
            params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
        ) -> tuple[PyTree, PyTree]:
            folded = None if key is None else jax.random.fold_in(key, index)
            return self.apply(params, state, x, train=train, key=folded)

        return Layer(init, apply)


@dataclass(frozen=True)
class Chain(Layer):
    """Layers one after the other; made by `chain`."""

    layers: tuple[Layer, ...] = ()

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers)

    def at(self, index: int | jax.Array) -> Layer:
        return chain(self.layers, first=index)


def chain(layers: Sequence[Layer], *, first: int | jax.Array = 0) -> Layer:
    """Layers one after the other, as one layer.

    Args:
      layers: at least one layer.
      first: the number of the first of them in the whole network.

    Returns:
      A layer whose params and state are tuples in the order of the layers.

    Raises:
      ValueError: there is no layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fdg_jax import from_fn
      >>> net = chain([from_fn(jnp.tanh), from_fn(lambda x: 2 * x)])
      >>> y, state = net.apply(((), ()), ((), ()), jnp.zeros(3), train=False, key=None)
      >>> y.shape, state
      ((3,), ((), ()))
    """
    layers = tuple(layers)
    if not layers:
        raise ValueError("layers=[]: a chain needs at least one layer")
    placed, index = [], first
    for layer in layers:
        placed.append(layer.at(index))
        index = index + layer.size

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

    return Chain(init, apply, layers)


@dataclass(frozen=True)
class Repeat(Layer):
    """Equal layers one after the other; made by `repeat`."""

    layer: Layer | None = None
    times: int = 1
    unroll: bool | None = None

    @property
    def size(self) -> int:
        assert self.layer is not None
        return self.times * self.layer.size

    def at(self, index: int | jax.Array) -> Layer:
        return self.of(self.times, first=index)

    def of(self, times: int, *, first: int | jax.Array = 0) -> Layer:
        """The same layer another number of times."""
        assert self.layer is not None
        return repeat(self.layer, times, unroll=self.unroll, first=first)


def repeat(
    layer: Layer, n: int, *, unroll: bool | None = None, first: int | jax.Array = 0
) -> Layer:
    """The same layer n times, each with its own parameters; `partition` may cut between any two.

    Args:
      layer: a layer whose output has the shapes and dtypes of its input.
      n: how many, >= 1.
      unroll: True writes the n layers out, False compiles one of them inside ``lax.scan``. None
        unrolls on CPU, where XLA runs convolutions inside a loop 6 to 16 times slower, and scans
        on GPU and TPU, where compile time grows with what is written out.
      first: the number of the first of them in the whole network.

    Returns:
      A layer whose params and state are those of ``layer`` with a new leading axis of length n,
      whichever way it compiles.

    Raises:
      ValueError: n < 1, or (from ``init``) the layer changes the shape of its input.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> double = Layer(lambda key, x: (jnp.float32(2), ()),
      ...                lambda p, s, x, *, train, key: (p * x, s))
      >>> net = repeat(double, 3)
      >>> params, state = net.init(jax.random.key(0), jnp.ones(1))
      >>> params.shape, net.apply(params, state, jnp.ones(1), train=False, key=None)[0].item()
      ((3,), 8.0)
    """
    if n < 1:
        raise ValueError(f"n={n}: a layer is repeated at least once")

    # One compiled program for all of them, so that a weight's bits do not depend on the cuts.
    init_one = jax.jit(lambda key, index, x: layer.at(index).init(key, x))

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        parts = [init_one(key, jnp.uint32(first + i * layer.size), x) for i in range(n)]
        params, state = parts[0]
        y = output_of(layer, params, state, x)
        if jax.tree.map(_signature, y) != jax.tree.map(_signature, x):
            raise ValueError(
                f"layer: a repeated layer must keep its input's shape, but it maps "
                f"{jax.tree.map(_signature, x)} to {jax.tree.map(_signature, y)}; "
                "put the layer that changes the shape outside of `repeat`"
            )
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, PyTree]:
        if jax.default_backend() == "cpu" if unroll is None else unroll:
            new_state = []
            for i, (p, s) in enumerate(zip(_unstack(params, n), _unstack(state, n), strict=True)):
                x, s = layer.at(first + i * layer.size).apply(p, s, x, train=train, key=key)
                new_state.append(s)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new_state)

        def body(x: PyTree, one: tuple[PyTree, PyTree, jax.Array]) -> tuple[PyTree, PyTree]:
            p, s, i = one
            return layer.at(first + i * layer.size).apply(p, s, x, train=train, key=key)

        return jax.lax.scan(body, x, (params, state, jnp.arange(n)))

    return Repeat(init, apply, layer, n, unroll)


def _signature(leaf: jax.Array) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _unstack(tree: PyTree, n: int) -> list[PyTree]:
    # One split: its derivative is one concatenation, where n slices would give n padded sums.
    leaves, structure = jax.tree.flatten(tree)
    parts = [jax.lax.split(leaf, [1] * n) for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[i][0] for part in parts]) for i in range(n)]
