"""A workload's truth and how well scores agree with it; the statistics are `attribution_core.evaluate`'s."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def summary(correlations: np.ndarray, slope: float) -> list[float]:
    """Return LDS, the ends of its interval, and the slope, to the digits that a results file has."""
    return [round(float(value), 4) for value in (correlations.mean(), *interval(correlations), slope)]


def read_results(path: Path) -> dict[str, Any]:
    """Return what a study's file holds; nothing if there is none yet."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write_results(path: Path, found: dict[str, Any]) -> None:
    """Write a study's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def interval(correlations: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval over queries of a mean correlation."""
    return percentiles(lds.bootstrap_queries(correlations, RESAMPLES, np.random.default_rng(0)), 0.95)
