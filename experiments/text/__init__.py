"""A language model: its settings, its text, its network."""
