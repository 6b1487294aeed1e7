"""Partitions layers into stages of equal cost."""

from fdg_jax.partition.cuts import Cost, Partition, optimal_cuts, partition, units_of
from fdg_jax.partition.per_layer import per_layer

__all__ = ["Cost", "Partition", "optimal_cuts", "partition", "per_layer", "units_of"]
