"""Helpers shared by several programs; independent of training."""
