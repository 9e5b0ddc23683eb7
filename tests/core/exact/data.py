"""Data sets for exact methods: noisy linear rules and handwritten digits, with a column of ones for the bias."""

import numpy as np
from mnist import load_digits


def with_ones(inputs: np.ndarray) -> np.ndarray:
    return np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)


def regression(n: int = 60, dim: int = 6, outputs: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    features = with_ones(generator.normal(size=(n, dim)))
    rule = generator.normal(size=(outputs, dim + 1))
    return features, features @ rule.T + generator.standard_t(3, size=(n, outputs))


def classes(n: int = 80, dim: int = 4, count: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    features = with_ones(generator.normal(size=(n, dim)))
    outputs = features @ generator.normal(size=(count, dim + 1)).T + 1.5 * generator.normal(size=(n, count))
    return features, outputs.argmax(1)


def digits(n: int = 500, queries: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Digits averaged to 7 × 7 pixels: training features and labels, query features and labels."""
    both = load_digits()
    small = [part.images.reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(-1, 49) / 255 for part in both]
    features, asked = (with_ones(images) for images in small)
    return features[:n], both[0].labels[:n], asked[:queries], both[1].labels[:queries]


def slope(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the slope of a prediction on the truth: 1 is calibrated."""
    return float(found.ravel() @ exact.ravel() / (exact.ravel() @ exact.ravel()))


def correlation(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.corrcoef(found.ravel(), exact.ravel())[0, 1])


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Largest difference as a share of the largest true magnitude."""
    return float(np.abs(found - exact).max() / np.abs(exact).max())
