"""Training data: from files to canonical Parquet, and from there to batches."""
