"""A projected curvature, and what a group of examples leaves of it, by Woodbury's identity in feature space."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from attribution_core.curvature.base import unit_of_damping
from attribution_core.errors import InvalidInputError, SingularCurvatureError
from attribution_core.exact.newton import solve_without

# The side of the largest dense system that a group may need: 0.5 GB in float64.
MAX_SIDE = 8192


@dataclass(frozen=True)
class Kernel:
    """`K + λ` of rows in k dimensions, as a sum over examples.

    Attributes:
        values: eigenvalues of K, (k,).
        vectors: eigenvectors, (k, k).
        damping: λ as a multiple of the mean eigenvalue of the whole.
    """

    values: np.ndarray
    vectors: np.ndarray
    damping: float

    def solve_without(self, parts: Iterable[np.ndarray], vector: np.ndarray) -> np.ndarray:
        """Return `(K + λ - UᵀU)⁻¹ v` for v (k,).

        With `R = V (Λ + λ)^{-1/2}` and `T = U R` this is `R (I - TᵀT)⁻¹ Rᵀ v`, solved in the smaller of k and the number of rows.

        Args:
            parts: rows U of the group that leaves, (count, k) each.
            vector: v.

        Raises:
            SingularCurvatureError: if what is left cannot be inverted.
            InvalidInputError: if both the group and the features are too many for a dense solve.
        """
        values = self.values.astype(np.float64)
        damped = values.clip(min=0) + self.damping * unit_of_damping(values.mean())
        if damped.min() <= 0:
            raise SingularCurvatureError("the projected curvature is singular: use a damping above 0", "/damping")
        root = self.vectors.astype(np.float64) / np.sqrt(damped)
        rooted = np.empty((0, len(values)))
        for part in parts:
            rooted = _folded(np.concatenate([rooted, part @ root]))
        try:
            solved = solve_without(rooted.T, (vector @ root)[:, None])[:, 0]
        except SingularCurvatureError:
            raise SingularCurvatureError(
                "without this group the projected curvature is singular: use a larger damping, or additive", "/damping"
            ) from None
        return np.asarray(root @ solved)


def _folded(rows: np.ndarray) -> np.ndarray:
    """Return rows with the same second moment, no more of them than dimensions."""
    if min(rows.shape) > MAX_SIDE:
        raise InvalidInputError(
            f"the newton estimator takes groups or projections of up to {MAX_SIDE:,}: use additive", "/estimator"
        )
    return np.asarray(np.linalg.qr(rows, mode="r")) if len(rows) > 2 * rows.shape[1] else rows
