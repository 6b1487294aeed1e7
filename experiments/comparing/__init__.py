"""What many runs show together."""
