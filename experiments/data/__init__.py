"""Image-classification data in memory: sources, augmentation, mini-batches."""

from experiments.data import cache
from experiments.data.augment import augment, normalise
from experiments.data.loader import Loader, evaluation_batches
from experiments.data.source import Dataset, load

__all__ = ["Dataset", "Loader", "augment", "cache", "evaluation_batches", "load", "normalise"]
