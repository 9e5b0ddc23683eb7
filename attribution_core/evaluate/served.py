"""What an index keeps of an evaluation, to correct and bound its answers to queries that were not part of it.

1. Map: from predicted to realised changes, common to all queries (`calibration`).
2. Scale: `σ(S)² = e^a u(S)^b` with `u = Σ_{i removed} τ_i²`, by least squares of the logarithm of squared residuals on that of u over the fit
   subsets, 0 ≤ b ≤ 1: a query whose examples matter more is predicted less closely, though less than in proportion.
3. Conformity over the calibration subsets: `|f − f̂| / σ`, of all queries together. Each subset weighs the same and a new one as much, so the
   quantile of rank `level · (n + 1)/n` among n subsets covers a new query under a new subset at the level.

Sources: Lei et al. 2018, section 5.2 (locally weighted conformal prediction); Dunn et al. 2022 (pooling over groups).
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
from attribution_core.evaluate.conformal import least_subsets, squared_scores_removed
from attribution_core.evaluate.lds import predicted_outputs
from attribution_core.evaluate.retrainings import Retrainings

_GRID = 999
_LEAST = 1e-12


@dataclass(frozen=True)
class ServedCalibration:
    """A fitted calibration with intervals, as an index keeps it.

    Attributes:
        map: from predicted to realised changes.
        log_variance: a, of the measurement's unit squared where u is 1.
        power: b.
        conformity: quantiles of `|residual| / σ` at evenly spaced ranks from 0 to 1.
        subsets: calibration subsets; they limit the coverage that can be stated.
        removed_share: (smallest, largest) share of the training set that the retrainings left out.
        num_examples: of the training set.
    """

    map: Calibration
    log_variance: float
    power: float
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
        share = min(level * (self.subsets + 1) / self.subsets, 1.0)
        place = int(np.ceil(share * (len(self.conformity) - 1)))
        return float(self.conformity[place] * _scale(np.array(spread), self.log_variance, self.power))

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "kind": "affine" if isinstance(self.map, AffineCalibration) else "isotonic",
            "map": self.map.as_json(),
            "log_variance": self.log_variance,
            "power": self.power,
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
            log_variance=found["log_variance"],
            power=found["power"],
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
    residuals = changes.means.T - fitted.apply(predicted)  # (queries, subsets)
    log_variance, power = _fitted_scale(residuals[:, fitting], spreads[:, fitting])
    conformity = np.abs(residuals[:, calibrating]) / _scale(spreads[:, calibrating], log_variance, power)
    shares = bank.removed_shares
    return ServedCalibration(
        map=fitted,
        log_variance=log_variance,
        power=power,
        conformity=np.quantile(conformity, np.linspace(0, 1, _GRID + 1), method="higher"),
        subsets=len(calibrating),
        removed_share=(float(shares.min()), float(shares.max())),
        num_examples=bank.masks.shape[1],
    )


def _scale(spread: np.ndarray, log_variance: float, power: float) -> np.ndarray:
    """Return σ for `u`, of any shape."""
    return np.asarray(np.exp(log_variance / 2) * np.maximum(spread, _LEAST) ** (power / 2))


def _fitted_scale(residuals: np.ndarray, spreads: np.ndarray) -> tuple[float, float]:
    """Return a and b of the scale, from (queries, subsets) each."""
    squares = np.log(np.maximum(np.square(residuals), _LEAST)).ravel()
    sizes = np.log(np.maximum(spreads, _LEAST)).ravel()
    gaps = sizes - sizes.mean()
    total = float(gaps @ gaps)
    power = float(np.clip(gaps @ squares / total, 0, 1)) if total > 0 else 0.0
    return float(squares.mean() - power * sizes.mean()), power
