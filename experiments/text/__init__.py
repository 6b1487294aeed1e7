"""A language model: the settings, the task, its text, its network."""
