"""A workload's truth and how well scores agree with it; the statistics are `attribution_core.evaluate`'s."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attribution_core.evaluate import lds
from attribution_core.evaluate.ranks import percentiles, pooled_slope
from attribution_core.evaluate.retrainings import Retrainings

RESAMPLES = 1000


@dataclass(frozen=True)
class Truth(Retrainings):
    """What real retraining gave."""

    @classmethod
    def read(cls, path: Path) -> "Truth":
        """Return a stored truth."""
        with np.load(path) as file:
            masks = np.unpackbits(file["masks"], axis=1, count=int(file["n"])).astype(bool)
            return cls(masks, file["values"].astype(np.float64))

    def correlations(self, scores: np.ndarray) -> np.ndarray:
        """Return each query's rank correlation, for scores (queries, n)."""
        return lds.correlations(scores, self)

    def ceiling(self) -> float:
        """Return the LDS that a perfect predictor of the expected output would reach; 1 where training has no noise to measure."""
        found = lds.ceiling(self)
        return 1.0 if found is None else found

    def slope(self, scores: np.ndarray) -> float:
        """Return the slope of predicted on true outputs within queries, pooled: 1 where effects have the right size."""
        bank = self.usable
        return pooled_slope(lds.predicted_outputs(scores, bank.masks), bank.means.T)


def interval(correlations: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval over queries of a mean correlation."""
    return percentiles(lds.bootstrap_queries(correlations, RESAMPLES, np.random.default_rng(0)), 0.95)
