"""Feature rows of the training set on disk."""
