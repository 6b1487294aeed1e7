"""What a benchmark times, and the tables and pictures of it."""
