"""The networks of the benchmark in PyTorch and their training loops."""
