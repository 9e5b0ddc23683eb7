"""The linear datamodeling score: how well summed scores rank the outputs of real retrainings on random subsets.

`LDS = mean_z Spearman_j(f_z(S_j), Σ_{i ∈ S_j} τ_i(z))`. Source: Park et al. 2023, definition 2.3.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Truth:
    """What real retraining gave.

    Attributes:
        masks: which examples each subset keeps, (subsets, n) bool.
        values: the queries' measurements, (subsets, seeds, queries).
    """

    masks: np.ndarray
    values: np.ndarray

    @classmethod
    def read(cls, path: Path) -> "Truth":
        """Return a stored truth."""
        with np.load(path) as file:
            masks = np.unpackbits(file["masks"], axis=1, count=int(file["n"])).astype(bool)
            return cls(masks, file["values"].astype(np.float64))

    def correlations(self, scores: np.ndarray) -> np.ndarray:
        """Return each query's rank correlation, for scores (queries, n)."""
        predicted = scores.astype(np.float64) @ self.masks.T  # (queries, subsets)
        return _spearman(predicted, self.values.mean(1).T)

    def ceiling(self) -> float:
        """Return the LDS that a perfect predictor of the expected output would reach: the root of the truth's reliability.

        Half of the seeds against the other half gives the reliability of a half; Spearman and Brown's formula that of all.
        """
        seeds = self.values.shape[1]
        if seeds == 1:
            return 1.0
        generator, halves = np.random.default_rng(0), []
        for _ in range(20):
            order = generator.permutation(seeds)
            first, second = (self.values[:, part].mean(1).T for part in (order[: seeds // 2], order[seeds // 2 :]))
            halves.append(float(_spearman(first, second).mean()))
        half = float(np.mean(halves))
        return float(np.sqrt(2 * half / (1 + half)))

    def slope(self, scores: np.ndarray) -> float:
        """Return the slope of predicted on true outputs within queries, pooled: 1 where effects have the right size."""
        predicted = scores.astype(np.float64) @ self.masks.T
        true = self.values.mean(1).T
        predicted = predicted - predicted.mean(1, keepdims=True)
        true = true - true.mean(1, keepdims=True)
        return float((predicted * true).sum() / (true * true).sum())


def interval(correlations: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval over queries of a mean correlation."""
    generator = np.random.default_rng(0)
    means = correlations[generator.integers(0, len(correlations), (RESAMPLES, len(correlations)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the rank correlation of each pair of rows; ties share their mean rank's order of appearance."""
    ranks = [values.argsort(1).argsort(1).astype(np.float64) for values in (first, second)]
    centred = [values - values.mean(1, keepdims=True) for values in ranks]
    norms = [np.linalg.norm(values, axis=1) for values in centred]
    product: np.ndarray = (centred[0] * centred[1]).sum(1) / (norms[0] * norms[1])
    return product
