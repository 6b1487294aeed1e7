"""A trained model on its own."""
