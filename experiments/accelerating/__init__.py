"""Parts of experiments.accelerator."""
