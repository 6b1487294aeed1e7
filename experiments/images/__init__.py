"""Image classification: settings and task."""
