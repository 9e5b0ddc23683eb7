"""Retrainings without their intercept: contrasts between subsets, of equal and independent noise.

With k_j finished seeds, `f̄_j = b + x_jᵀβ + ε_j`, `ε_j ~ N(0, σ²/k_j)`. Multiplying by √k_j makes noise equal; an orthonormal C (m−1, m) with
`C √k = 0` then removes b for good, which is what a flat prior on it does: `f̃ = X̃β + ε̃`, `ε̃ ~ N(0, σ²I)`. Source: Patterson & Thompson 1971.
"""

from dataclasses import dataclass

import numpy as np

from attribution_core.evaluate.retrainings import Retrainings


@dataclass(frozen=True)
class Contrasts:
    """A bank in contrast coordinates.

    Attributes:
        design: X̃, (m − 1, n).
        targets: f̃, (queries, m − 1).
        center: weighted mean of masks, (n,).
        level: weighted mean of measurements, (queries,).
        trainings: finished retrainings, Σ k_j; the level's noise is σ² over this.
    """

    design: np.ndarray
    targets: np.ndarray
    center: np.ndarray
    level: np.ndarray
    trainings: int

    @classmethod
    def of(cls, retrainings: Retrainings) -> "Contrasts":
        """Return the contrasts of the subsets that have a finished retraining."""
        bank = retrainings.usable
        roots = np.sqrt(bank.counts.astype(np.float64))
        basis, _ = np.linalg.qr(np.column_stack([roots, np.eye(len(roots))[:, 1:]]))
        to = basis[:, 1:].T * roots  # (m - 1, m)
        weights = bank.counts / bank.counts.sum()
        masks = bank.masks.astype(np.float64)
        return cls(to @ masks, (to @ bank.means).T, weights @ masks, weights @ bank.means, int(bank.counts.sum()))
