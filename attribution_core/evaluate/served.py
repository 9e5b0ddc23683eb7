"""What an index keeps of an evaluation, to correct and bound its answers to queries that were not part of it.

A prediction for a new query takes the scale of the evaluation's queries in common: `σ(S)² = a + b u(S)` with the mean noise a and the geometric
mean growth b of `conformal.Intervals`, and the conformity quantile of that common scale, so that coverage holds over new queries as well as new subsets.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from attribution_core.evaluate.calibration import (
    AffineCalibration,
    Calibration,
    IsotonicCalibration,
    calibrate,
    trusted,
)
from attribution_core.evaluate.conformal import fit_intervals, least_subsets, realised_values, squared_scores_removed
from attribution_core.evaluate.lds import predicted_outputs
from attribution_core.evaluate.retrainings import Retrainings

_GRID = 999
_SPLIT_LEVEL = 0.5  # any level: the scale does not depend on it


@dataclass(frozen=True)
class ServedCalibration:
    """A fitted calibration with intervals, as an index keeps it.

    Attributes:
        map: from predicted to realised changes.
        noise: a, variance in units of the measurement squared.
        growth: b.
        conformity: quantiles of `|residual| / σ` at evenly spaced ranks from 0 to 1.
        subsets: calibration subsets; they limit the coverage that can be stated.
        removed_share: (smallest, largest) share of the training set that the retrainings left out.
        num_examples: of the training set.
    """

    map: Calibration
    noise: float
    growth: float
    conformity: np.ndarray
    subsets: int
    removed_share: tuple[float, float]
    num_examples: int

    def predict(self, change: float, spread: float, removed: int, level: float | None) -> dict[str, Any]:
        """Return the calibrated change, its interval and whether they may be trusted.

        Args:
            change: predicted change of the measurement, as the method has it.
            spread: `Σ_{i removed} τ_i²`.
            removed: how many training examples are left out.
            level: coverage asked for, None for no interval.

        Returns:
            `change`, `interval` (low, high) of the change or None, `calibrated`; the change as it came where retraining did not cover such removals.
        """
        if not trusted(removed, self.num_examples, [self.removed_share]).calibrated:
            return {"change": change, "interval": None, "calibrated": False}
        centre = float(self.map.apply(np.array(change)))
        half = None if level is None else self._half_width(spread, level)
        interval = None if half is None else [centre - half, centre + half]
        return {"change": centre, "interval": interval, "calibrated": True}

    def _half_width(self, spread: float, level: float) -> float | None:
        if self.subsets < least_subsets(level):
            return None
        share = min(np.ceil((self.subsets + 1) * level) / self.subsets, 1.0)
        place = int(np.ceil(share * (len(self.conformity) - 1)))
        return float(self.conformity[place] * np.sqrt(self.noise + self.growth * spread))

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "kind": "affine" if isinstance(self.map, AffineCalibration) else "isotonic",
            "map": self.map.as_json(),
            "noise": self.noise,
            "growth": self.growth,
            "conformity": self.conformity.tolist(),
            "subsets": self.subsets,
            "removed_share": list(self.removed_share),
            "num_examples": self.num_examples,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "ServedCalibration":
        """Undo `as_json`."""
        kind = AffineCalibration if found["kind"] == "affine" else IsotonicCalibration
        return cls(
            map=kind(**found["map"]),
            noise=found["noise"],
            growth=found["growth"],
            conformity=np.array(found["conformity"]),
            subsets=found["subsets"],
            removed_share=tuple(found["removed_share"]),
            num_examples=found["num_examples"],
        )


def fit_served(scores: np.ndarray, retrainings: Retrainings, full: np.ndarray, *, seed: int = 0) -> ServedCalibration:
    """Fit map and scale on one half of the subsets and the conformity on the other.

    Args:
        scores: of the evaluation's queries, (queries, n).
        retrainings: the bank.
        full: the index's own outputs, which changes are counted from, (queries,).
        seed: of the split.

    Raises:
        InvalidInputError: if too few subsets have a finished retraining.
    """
    bank = retrainings.usable
    changes = Retrainings(bank.masks, bank.values - full)
    order = np.random.default_rng(seed).permutation(len(bank.masks))
    fitting, calibrating = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    # What is removed changes the output by minus its scores: the kept ones' sum minus that of all.
    predicted = predicted_outputs(scores, bank.masks) - scores.sum(1, dtype=np.float64)[:, None]
    spreads = squared_scores_removed(scores, bank.masks)
    fitted = calibrate(predicted[:, fitting], changes.means.T[:, fitting], seed=seed)
    centred = fitted.apply(predicted)
    intervals = fit_intervals(centred, spreads, changes, fitting, calibrating, level=_SPLIT_LEVEL)
    noise, growth = float(intervals.noise.mean()), float(np.exp(np.log(intervals.growth).mean()))
    truth, _ = realised_values(changes, "mean")
    scale = np.sqrt(noise + growth * spreads[:, calibrating])
    conformity = np.abs(truth[:, calibrating, 0] - centred[:, calibrating]) / scale
    shares = bank.removed_shares
    return ServedCalibration(
        map=fitted,
        noise=noise,
        growth=growth,
        conformity=np.quantile(conformity[np.isfinite(conformity)], np.linspace(0, 1, _GRID + 1), method="higher"),
        subsets=len(calibrating),
        removed_share=(float(shares.min()), float(shares.max())),
        num_examples=bank.masks.shape[1],
    )
