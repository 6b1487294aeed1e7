"""Programs that train with fdg_jax: python -m experiments.<name>; folders contain their modules."""
