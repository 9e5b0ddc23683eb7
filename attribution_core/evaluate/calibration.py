"""From predicted to realised changes, by what real retraining gave: one map per measurement, common to its queries.

Affine: `f = a + s p` by least squares. Isotonic: the best monotone step map, by pool-adjacent-violators (Ayer et al. 1955), linear between steps and with
the outermost steps' values beyond. Isotonic needs many subsets; it is taken where it predicts left-out subsets better.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.result import Result

_ISOTONIC_SUBSETS = 30
_FOLDS = 5


@dataclass(frozen=True)
class AffineCalibration(Result):
    """`f = intercept + slope · p`.

    Attributes:
        intercept: in units of the measurement.
        slope: realised per predicted change.
        subsets: subsets it was fitted on.
    """

    intercept: float
    slope: float
    subsets: int

    def apply(self, predicted: np.ndarray) -> np.ndarray:
        """Return calibrated changes of any shape."""
        return np.asarray(self.intercept + self.slope * predicted)


@dataclass(frozen=True)
class IsotonicCalibration(Result):
    """A monotone map, linear between knots and constant beyond them.

    Attributes:
        predicted: knots, ascending.
        realised: values there, not descending.
        subsets: subsets it was fitted on.
    """

    predicted: tuple[float, ...]
    realised: tuple[float, ...]
    subsets: int

    def apply(self, predicted: np.ndarray) -> np.ndarray:
        """Return calibrated changes of any shape."""
        return np.asarray(np.interp(predicted, self.predicted, self.realised))


Calibration = AffineCalibration | IsotonicCalibration


def fit_affine(predicted: np.ndarray, realised: np.ndarray) -> AffineCalibration:
    """Return the least-squares line through pairs, both (queries, subsets)."""
    gap = predicted - predicted.mean()
    total = float((gap**2).sum())
    slope = float((gap * realised).sum()) / total if total > 0 else 0.0
    return AffineCalibration(float(realised.mean()) - slope * float(predicted.mean()), slope, predicted.shape[1])


def fit_isotonic(predicted: np.ndarray, realised: np.ndarray) -> IsotonicCalibration:
    """Return the best monotone map through pairs, both (queries, subsets)."""
    places, where = np.unique(predicted.ravel(), return_inverse=True)
    weights = np.bincount(where).astype(np.float64)
    means = np.bincount(where, realised.ravel()) / weights
    levels, sizes = _pool_adjacent_violators(means, weights)
    heights = np.repeat(levels, sizes)
    ends = np.cumsum(sizes) - 1
    knots = np.unique(np.concatenate([ends - sizes + 1, ends]))
    return IsotonicCalibration(tuple(places[knots].tolist()), tuple(heights[knots].tolist()), predicted.shape[1])


def _pool_adjacent_violators(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return block values and their sizes of the closest sequence that never descends."""
    levels: list[float] = []
    masses: list[float] = []
    sizes: list[int] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        level, mass, size = value, weight, 1
        while levels and levels[-1] >= level:
            before = masses.pop()
            level = (levels.pop() * before + level * mass) / (before + mass)
            mass += before
            size += sizes.pop()
        levels.append(level)
        masses.append(mass)
        sizes.append(size)
    return np.array(levels), np.array(sizes)


def calibrate(predicted: np.ndarray, realised: np.ndarray, *, seed: int = 0) -> Calibration:
    """Return the map that predicts left-out subsets better; affine with few subsets.

    Args:
        predicted: (queries, subsets).
        realised: (queries, subsets), finite.
        seed: of the folds.

    Raises:
        InvalidInputError: if there are fewer than two subsets.
    """
    subsets = predicted.shape[1]
    if subsets < 2:
        raise InvalidInputError("a calibration needs at least two subsets")
    if subsets < _ISOTONIC_SUBSETS:
        return fit_affine(predicted, realised)
    fold = np.random.default_rng(seed).permutation(subsets) % _FOLDS
    errors = {"affine": 0.0, "isotonic": 0.0}
    for part in range(_FOLDS):
        kept, left = fold != part, fold == part
        for name, fit in (("affine", fit_affine), ("isotonic", fit_isotonic)):
            guess = fit(predicted[:, kept], realised[:, kept]).apply(predicted[:, left])
            errors[name] += float(((guess - realised[:, left]) ** 2).sum())
    return (fit_isotonic if errors["isotonic"] < errors["affine"] else fit_affine)(predicted, realised)


@dataclass(frozen=True)
class Trust(Result):
    """Whether an answer may be called calibrated, and why.

    Attributes:
        calibrated: what the answer says.
        reason: in a sentence.
    """

    calibrated: bool
    reason: str


def trusted(removed: int, num_examples: int, protocols: Sequence[tuple[float, float]]) -> Trust:
    """Decide whether removing so many examples lies where retraining was measured.

    Args:
        removed: examples that the asked subset leaves out.
        num_examples: of the training set.
        protocols: (smallest, largest) removed share of each measured protocol of this index's bank; empty where nothing was measured.
    """
    if not protocols:
        return Trust(False, "no retraining has measured this index")
    share, step = removed / num_examples, 0.5 / num_examples
    low, high = min(low for low, _ in protocols), max(high for _, high in protocols)
    span = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    if low - step <= share <= high + step:
        return Trust(True, f"the removed share {share:.4g} lies in what retraining covered: {span}")
    return Trust(False, f"the removed share {share:.4g} lies outside of what retraining covered: {span}")
