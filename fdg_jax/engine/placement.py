"""The devices of a stage, in this process or another."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fdg_jax.engine import encoding
from fdg_jax.typing import PyTree

BATCH_AXIS = "data"


def stage_meshes(num_stages: int, devices: Sequence[jax.Device] | None = None) -> list[Mesh]:
    """One mesh per stage.

    Args:
      num_stages: K.
      devices: D devices. If D >= K, K contiguous groups of D // K; warns if devices are left over.
        If D < K, neighbouring stages share a device. None: one device per stage, the first of
        ``jax.devices()``; warns if there are fewer.

    Returns:
      K meshes with the single axis "data".

    Raises:
      ValueError: not a list of devices, an empty one, or duplicates; groups between which JAX
        cannot send arrays.

    Example:
      >>> [mesh.size for mesh in stage_meshes(2)]
      [1, 1]
    """
    if devices is not None and not (
        hasattr(devices, "__iter__") and all(isinstance(d, jax.Device) for d in devices)
    ):
        raise ValueError(
            f"devices={devices!r}: must be a list of devices, such as jax.devices()[:{num_stages}]"
        )
    chosen = list(jax.devices()[:num_stages] if devices is None else devices)
    if not chosen:
        raise ValueError(
            "devices=[]: a pipeline needs at least one device; None takes jax.devices()"
        )
    if len(set(chosen)) < len(chosen):
        raise ValueError(
            f"devices={chosen}: a device is named twice; name each once, stages may share"
        )
    if len(chosen) < num_stages:
        groups = [[chosen[k * len(chosen) // num_stages]] for k in range(num_stages)]
        if devices is None:
            _warn_of_sharing(groups)
    else:
        size = len(chosen) // num_stages
        groups = [chosen[k * size : (k + 1) * size] for k in range(num_stages)]
        if size * num_stages < len(chosen):
            warnings.warn(
                f"devices: {len(chosen)} do not divide into {num_stages} stages; "
                f"{len(chosen) - size * num_stages} stay unused",
                stacklevel=3,
            )
    _check_processes(groups)
    # Auto: the layers are the user's and contain no shardings.
    return [Mesh(np.array(group), (BATCH_AXIS,), axis_types=(AxisType.Auto,)) for group in groups]


def _warn_of_sharing(groups: list[list[jax.Device]]) -> None:
    """Warns which stages share a device if the user did not request it."""
    owners: dict[jax.Device, list[int]] = {}
    for k, (device,) in enumerate(groups):
        owners.setdefault(device, []).append(k)
    shared = "; ".join(
        f"{device} has stages {', '.join(map(str, ks))}"
        for device, ks in owners.items()
        if len(ks) > 1
    )
    warnings.warn(
        f"devices: {len(groups)} stages share {len(owners)} devices: {shared}. Results are "
        "the same, but stages of one device wait for each other; devices=jax.devices() says that "
        "it is meant",
        stacklevel=4,
    )


def _check_processes(groups: list[list[jax.Device]]) -> None:
    """Rejects messages both within and between processes, which JAX does not support."""
    owners = [frozenset(device.process_index for device in group) for group in groups]
    for k, (group, own) in enumerate(zip(groups, owners, strict=True)):
        for j in range(k):
            if len(own) > 1 and own == owners[j] and group != groups[j]:
                raise ValueError(
                    f"devices: stages {j} and {k} have different devices of the same processes "
                    f"{', '.join(map(str, sorted(own)))}; order the devices by process, or choose "
                    "a number of devices a stage that divides those of a process"
                )


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts arrays on devices that may be another process's; every process must call it.

    Args:
      tree: numpy arrays, equal in every process that has some of the devices, or JAX arrays on one
        stage's devices; typed keys.
      shardings: one per leaf, or one for all.

    Returns:
      The arrays; those on devices of other processes have only a shape here.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda leaf: shardings, tree)
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if not isinstance(leaf, jax.Array):
        value = np.asarray(leaf)
        # device_put to several processes compares the value between them, which waits.
        own = sharding.addressable_devices_indices_map(value.shape)
        shards = [jax.device_put(value[part], device) for device, part in own.items()]
        return jax.make_array_from_single_device_arrays(
            value.shape, sharding, shards, dtype=value.dtype
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and not leaf.committed:
        data = _put(np.asarray(jax.random.key_data(leaf)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.device_put(leaf, sharding)


def absent(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Arrays on another process's devices, as shapes only.

    Args:
      shapes: shapes and dtypes.
      shardings: one per leaf, or one for all.

    Returns:
      Arrays without data in this process.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda leaf: shardings, shapes)

    def one(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, [], dtype=leaf.dtype)

    return jax.tree.map(one, shapes, shardings)


def spread(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of arrays along the first axis divisible by the number of devices.

    Args:
      tree: arrays, which may be abstract.
      mesh: the devices.

    Returns:
      Shardings; an array without such an axis is replicated.
    """

    def one(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for axis, size in enumerate(leaf.shape):
            if size and size % mesh.size == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXIS))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, tree)


def gather(value: np.ndarray) -> np.ndarray:
    """Gathers a value from every process; every process must call it and waits for the others.

    Args:
      value: same shape and dtype in every process, at most 32 bits per element.

    Returns:
      The values, stacked along a new first axis by process.
    """
    if jax.process_count() == 1:
        return value[None]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(value))


class Placed:
    """The placement of a stage's arrays: replicated, or sharded over the batch.

    Args:
      mesh: the stage's devices, one axis.
      shard_optimizer: whether the optimizer state is sharded over the devices.
    """

    def __init__(self, mesh: Mesh, shard_optimizer: bool) -> None:
        self.mesh = mesh
        self.shard_optimizer = shard_optimizer
        self.replicated = NamedSharding(mesh, PartitionSpec())
        # Equal on one device, so that JAX sees that outputs of its programs are already placed.
        over = PartitionSpec(BATCH_AXIS) if mesh.size > 1 else PartitionSpec()
        self.sharded = NamedSharding(mesh, over)

    def _whole(self, tree: PyTree) -> PyTree:
        """Replicated over the stage's devices."""
        if self.mesh.size == 1:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.replicated)

    def _over_batch(self, tree: PyTree) -> PyTree:
        """Batch axis sharded over the stage's devices."""
        return tree if self.mesh.size == 1 else self.placed(tree)

    def placed(self, tree: PyTree) -> PyTree:
        """Constrains inputs, labels or messages to this stage's devices, inside a program."""
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, self.places(tree))

    def placement(self, leaf: Any) -> NamedSharding:
        """The sharding of a leaf of an input, label or message of this stage; replicated if its
        first axis is not divisible."""
        shape = getattr(leaf, "shape", ())
        return self.sharded if shape and shape[0] % self.mesh.size == 0 else self.replicated

    def places(self, tree: PyTree) -> PyTree:
        """The placement of a tree's leaves; the scales of encoded arrays have no batch axis."""
        return encoding.places(tree, self.placement, self.replicated)

    def shared(self, opt_state: PyTree) -> PyTree:
        """The shardings of the optimizer's state."""
        if self.shard_optimizer:
            return spread(opt_state, self.mesh)
        return jax.tree.map(lambda leaf: self.replicated, opt_state)
