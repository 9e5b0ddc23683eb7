"""Prediction intervals for counterfactual subsets by split conformal prediction.

1. Scale: `σ_z(S)² = a_z + b_z u_z(S)`, where a_z is the noise of the realised value itself (from seeds; 0 where one seed cannot tell), u the method's own
   account of its uncertainty, `Σ_{i removed} τ_i(z)²` or a posterior's variance, and b_z the least-squares fit of `(f − f̂)² − a` on u over the fit subsets,
   half of it (on the log scale) shared by all queries.
2. Conformity over the calibration subsets: `r_{z,j} = |f_z(S_j) − f̂_z(S_j)| / σ_z(S_j)`.
3. Quantile: of r over queries and all n calibration subsets together, the one at the share `(1 − α)(n + 1) / n`: a query of an exchangeable new subset is
   then covered with probability at least `1 − α`, however the queries of one subset depend on each other.
4. Interval: `f̂_z(S) ± quantile · σ_z(S)`: it shrinks with u, down to the noise.

Source: Vovk et al. 2005; Lei et al. 2018, section 5.2 (locally weighted); Lee, Barber & Willett 2023
(hierarchical conformal prediction).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.result import Result
from attribution_core.evaluate.retrainings import Retrainings

Realised = Literal["mean", "single_seed"]
_LEAST = 1e-6


@dataclass(frozen=True)
class Intervals(Result):
    """Fitted prediction intervals.

    Attributes:
        noise: a, (queries,), variance in units of the measurement squared.
        growth: b, (queries,).
        quantile: multiplier of σ.
        level: stated coverage.
        fit_subsets: subsets that gave the scale.
        calibration_subsets: subsets that gave the quantile.
        realised: what is covered: the mean over the bank's seeds, or a single retraining.
    """

    noise: np.ndarray
    growth: np.ndarray
    quantile: float
    level: float
    fit_subsets: int
    calibration_subsets: int
    realised: Realised

    def scale(self, uncertainty: np.ndarray) -> np.ndarray:
        """Return σ for the method's uncertainty u, both (queries, subsets)."""
        return np.asarray(np.sqrt(self.noise[:, None] + self.growth[:, None] * uncertainty))

    def bounds(self, predicted: np.ndarray, uncertainty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower and the upper end, both (queries, subsets)."""
        half = self.quantile * self.scale(uncertainty)
        return predicted - half, predicted + half


def squared_scores_removed(scores: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return `u_z(S) = Σ_{i removed} τ_i(z)²`, (queries, subsets)."""
    removed: np.ndarray = (scores.astype(np.float64) ** 2) @ (~masks).T.astype(np.float64)
    return removed


def least_subsets(level: float) -> int:
    """Return how many calibration subsets a stated coverage needs at least."""
    return int(np.ceil(level / (1 - level) - 1e-9))


def realised_values(retrainings: Retrainings, realised: Realised) -> tuple[np.ndarray, np.ndarray]:
    """Return what intervals have to cover and the noise in it: (queries, subsets, repeats), NaN where diverged, and variances (queries,)."""
    variance = retrainings.seed_variance()
    noise = np.zeros(retrainings.values.shape[2]) if variance is None else variance
    if realised == "single_seed":
        single = np.where(retrainings.finished[:, :, None], retrainings.values, np.nan)
        return single.transpose(2, 0, 1), noise
    usual = float(np.median(retrainings.counts[retrainings.counts > 0]))
    return retrainings.means.T[:, :, None], noise / usual


def fit_intervals(
    predicted: np.ndarray,
    uncertainty: np.ndarray,
    retrainings: Retrainings,
    fitting: np.ndarray,
    calibrating: np.ndarray,
    *,
    level: float = 0.9,
    realised: Realised = "mean",
) -> Intervals:
    """Fit the scale on some subsets and the quantile on others.

    Args:
        predicted: calibrated predictions of the measurement, (queries, subsets).
        uncertainty: u, (queries, subsets), not negative.
        retrainings: the bank.
        fitting: numbers of the subsets that give the scale.
        calibrating: numbers of those that give the quantile; the predictions must not have used them.
        level: coverage to state.
        realised: what to cover.

    Raises:
        InvalidInputError: if the splits overlap, or calibration subsets are too few for the level.
    """
    if np.intersect1d(fitting, calibrating).size:
        raise InvalidInputError("a subset cannot give both the scale and the quantile")
    truth, noise = realised_values(retrainings, realised)
    calibrating = calibrating[retrainings.finished[calibrating].any(1)]
    if len(calibrating) < least_subsets(level):
        raise InvalidInputError(f"intervals of level {level} need at least {least_subsets(level)} calibration subsets")
    residuals = truth - predicted[:, :, None]
    squares = np.nanmean(residuals[:, fitting] ** 2, axis=2) if truth.shape[2] > 1 else residuals[:, fitting, 0] ** 2
    growth = _growth(squares, noise, uncertainty[:, fitting])
    scale = np.sqrt(noise[:, None] + growth[:, None] * uncertainty[:, calibrating])
    conformity = np.abs(residuals[:, calibrating]) / scale[:, :, None]
    share = min((len(calibrating) + 1) * level / len(calibrating), 1.0)
    quantile = float(np.quantile(conformity[np.isfinite(conformity)], share, method="higher"))
    return Intervals(noise, growth, quantile, level, len(fitting), len(calibrating), realised)


def _growth(squares: np.ndarray, noise: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """Return b, (queries,), from squared residuals and u, both (queries, subsets)."""
    above = np.where(np.isfinite(squares), squares - noise[:, None], 0)
    normal = np.where(np.isfinite(squares), uncertainty**2, 0).sum(1)
    normal = normal.clip(min=np.finfo(float).tiny)
    least = _LEAST * np.nanmean(squares, axis=1).clip(min=np.finfo(float).tiny) * uncertainty.sum(1) / normal
    raw = np.maximum((above * uncertainty).sum(1) / normal, least)
    shared = np.exp(np.log(raw).mean())
    return np.asarray(np.sqrt(raw * shared))


def coverage(
    intervals: Intervals, predicted: np.ndarray, uncertainty: np.ndarray, retrainings: Retrainings, subsets: np.ndarray
) -> float:
    """Return the share of realised values of some subsets that lie in their interval."""
    truth, _ = realised_values(retrainings, intervals.realised)
    low, high = intervals.bounds(predicted[:, subsets], uncertainty[:, subsets])
    given = truth[:, subsets]
    inside = (given >= low[:, :, None]) & (given <= high[:, :, None])
    return float(inside[np.isfinite(given)].mean())
