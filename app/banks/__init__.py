"""Banks of retrained models, shared by all that learn from or are measured by them."""
