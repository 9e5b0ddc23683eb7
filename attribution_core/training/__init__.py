"""How models are trained, and trained again: recipes, many runs at once, banks of retrainings."""
