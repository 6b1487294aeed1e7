"""Image classifiers: the settings, the task."""
