"""A run that trains, whatever its task, from its settings to its files."""
