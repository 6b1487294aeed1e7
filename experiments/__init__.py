"""Programs that train with fdg_jax: python -m experiments.<name>; folders hold their parts."""
