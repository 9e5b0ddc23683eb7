"""Sizes of a bank's subsets where they vary: the law they are drawn from, and a sequence that covers it evenly.

Subsets that inform a semivalue count by `1/(t(1 − t))` at a share t, with a standard deviation of `√(t(1 − t))` for each example, so that of all laws
`P(a) ∝ 1/√(a(n − a))` gives Shapley values of least variance, and serves every Beta Shapley value. Source: Li & Yu 2024, One Sample Fits All, section 4.
"""

from functools import lru_cache

import numpy as np

_GOLDEN = 0.6180339887498949  # its multiples' fractions are spread evenly, however many there are
_UNIT = 2.0**-64


@lru_cache(maxsize=16)
def size_law(n: int) -> np.ndarray:
    """Return the probability of each size from 0 to n, (n + 1,): 0 for none and for all."""
    sizes = np.arange(1, n, dtype=np.float64)
    law = np.zeros(n + 1)
    law[1:n] = 1 / np.sqrt(sizes * (n - sizes))
    law /= law.sum()
    law.setflags(write=False)
    return law


def drawn_size(n: int, seed: int, number: int) -> int:
    """Return the size of the subset of a number: each follows `size_law`, over random seeds, and together they cover it evenly."""
    place = (_start(n, seed) + number * _GOLDEN) % 1.0
    return min(int(np.searchsorted(_cumulative(n), place, side="right")), n - 1)


@lru_cache(maxsize=16)
def _start(n: int, seed: int) -> float:
    return int(np.random.Philox(np.random.SeedSequence([seed, n])).random_raw()) * _UNIT


@lru_cache(maxsize=16)
def _cumulative(n: int) -> np.ndarray:
    return np.asarray(np.cumsum(size_law(n)))
