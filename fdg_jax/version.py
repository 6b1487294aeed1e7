"""The version, readable by a build without importing JAX."""

__version__ = "0.1.0"
