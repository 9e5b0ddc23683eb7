"""Top-k search for both signs of the score."""
