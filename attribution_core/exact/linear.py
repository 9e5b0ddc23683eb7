"""Ridge regression and ordinary least squares, one output or several: leaving examples out has a closed form.

With `A = XᵀX + λ`, `h_j = x_jᵀ A⁻¹ x_j` and residuals `r_j = y_j - θ* x_j`: `θ* - θ_{-j} = A⁻¹ x_j r_j / (1 - h_j)`, and for groups
`A⁻¹ X_Fᵀ (I - X_F A⁻¹ X_Fᵀ)⁻¹ r_F`. All n single changes cost O(n d²) together.
"""

from functools import cached_property
from typing import Self

import numpy as np

from attribution_core.exact.glm import GeneralizedLinear, Regulariser
from attribution_core.exact.losses import SquaredError
from attribution_core.exact.newton import Eigen, solve_remaining, solve_without


class RidgeRegression(GeneralizedLinear):
    """Squared errors `½‖θ x - y‖²`; targets (n, C). Arguments as in `GeneralizedLinear`."""

    @staticmethod
    def loss_of(num_outputs: int) -> SquaredError:
        """Return squared errors."""
        return SquaredError()

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        targets: np.ndarray,
        penalty: float,
        *,
        regulariser: Regulariser = "fixed",
        pseudo_inverse: bool = False,
    ) -> Self:
        """Return the model at its optimum.

        Raises:
            SingularCurvatureError: if there are several optima and no pseudo-inverse is wanted.
        """
        parameters = ridge(features, targets, penalty, pseudo_inverse=pseudo_inverse)
        return cls(features, targets, parameters, penalty, regulariser=regulariser, pseudo_inverse=pseudo_inverse)

    def solve(self, vectors: np.ndarray, penalty: float) -> np.ndarray:
        """Return `A⁻¹` of each output's vector."""
        return self._gram.solve(vectors, penalty)

    def hat(self, penalty: float | None = None) -> np.ndarray:
        """Return the hat matrix `X A⁻¹ Xᵀ`, (n, n), which turns targets into predictions."""
        root = self._rooted(np.arange(len(self.features)), self.penalty if penalty is None else penalty)
        product: np.ndarray = root @ root.T
        return product

    def leverages(self, rows: np.ndarray, penalty: float) -> np.ndarray:
        """Return `h_j I`."""
        diagonal = (self._rooted(rows, penalty) ** 2).sum(1)
        leverages: np.ndarray = diagonal[:, None, None] * np.eye(len(self.parameters))
        return leverages

    def slopes_alone(self, rows: np.ndarray, penalty: float, offset: np.ndarray) -> np.ndarray:
        """Return `(slope_j + offset x_j) / (1 - h_j)`."""
        leverages = (self._rooted(rows, penalty) ** 2).sum(1)[:, None, None]
        right = self.slopes[rows] + self.features[rows] @ offset.T
        return solve_remaining(leverages, right[:, None, :])[:, 0]

    def slopes_together(self, rows: np.ndarray, penalty: float, offset: np.ndarray) -> np.ndarray:
        """Return `(I - X_F A⁻¹ X_Fᵀ)⁻¹ (slopes_F + X_F offsetᵀ)`."""
        right = self.slopes[rows] + self.features[rows] @ offset.T
        return solve_without(self._rooted(rows, penalty), right)

    def refitted(self, rows: np.ndarray) -> np.ndarray:
        """Return the closed form without a group of rows."""
        rest = np.delete(np.arange(len(self.features)), rows)
        penalty = self.penalty_without(len(self.features) - len(rest))
        return ridge(self.features[rest], self.targets[rest], penalty, pseudo_inverse=self.pseudo_inverse)

    @cached_property
    def _gram(self) -> Eigen:
        return Eigen(self.features.T @ self.features, pseudo_inverse=self.pseudo_inverse)

    def _rooted(self, rows: np.ndarray, penalty: float) -> np.ndarray:
        """Return rows of `X A^{-1/2}`, (rows, d)."""
        rooted: np.ndarray = self.features[rows] @ self._gram.inverse_root(penalty)
        return rooted


def ridge(
    features: np.ndarray,
    targets: np.ndarray,
    penalty: float,
    *,
    weights: np.ndarray | None = None,
    pseudo_inverse: bool = False,
) -> np.ndarray:
    """Return the minimiser (C, d) of `½ Σ w_i ‖θ x_i - y_i‖² + (λ/2) ‖θ‖²`; the shortest of several with the pseudo-inverse.

    Raises:
        SingularCurvatureError: if there are several and no pseudo-inverse is wanted.
    """
    weighted = features if weights is None else features * weights[:, None]
    return Eigen(weighted.T @ features, pseudo_inverse=pseudo_inverse).solve(targets.T @ weighted, penalty)
