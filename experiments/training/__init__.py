"""A run that trains an image classifier, from its settings to its files."""
