"""Data sets of training and query examples."""
