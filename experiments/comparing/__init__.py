"""Series of runs and their comparison."""
