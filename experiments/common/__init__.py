"""What several programs use; knows no training."""
