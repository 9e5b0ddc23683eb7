"""Counter-based random numbers: each is a pure function of a seed and its counter, the same on every machine and for any batch size."""

import numpy as np


def hashed(seed: int, counters: np.ndarray) -> np.ndarray:
    """Return 64 uniform bits per counter (uint64), by two rounds of splitmix64 over seed and counter."""
    with np.errstate(over="ignore"):
        state = _mixed(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15))
        return _mixed(_mixed(counters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state) ^ state)


def normal(seed: int, counters: np.ndarray) -> np.ndarray:
    """Return a standard normal number per counter (float64), by the Box-Muller transform of two uniforms."""
    bits = hashed(seed, counters)
    first = ((bits >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32
    second = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32
    found: np.ndarray = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
    return found


def _mixed(bits: np.ndarray | np.uint64) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ (bits >> np.uint64(31)))
