"""Training runs of any task, from settings to files."""
