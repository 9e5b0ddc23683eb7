"""Models and their checkpoints."""
