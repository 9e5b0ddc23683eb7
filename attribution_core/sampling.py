"""A part that stands for the whole."""

import numpy as np


def evenly_spread(count: int, most: int) -> np.ndarray:
    """Return up to `most` of the places 0 … count − 1, evenly spread, ascending and without repeats; the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)
