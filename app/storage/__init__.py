"""Files: published artifacts, and the roots an operator opened."""
