"""What leaving examples out does to a model that is linear in its parameters.

Outputs are `o_i = θ x_i` with θ (C, d), flattened class by class to P = C·d numbers; a bias is a column of ones in the features. θ* minimises
`Σ ℓ_i(o_i) + (λ/2) ‖θ‖²`; the mean form, mean loss + (l2/2) ‖θ‖², is λ = n·l2. With `J_i = I ⊗ x_iᵀ`, slopes `r_i = ∂ℓ_i/∂o_i` and curvatures
`D_i = ∂²ℓ_i/∂o_i² = L_i L_iᵀ`, an example's gradient is `g_i = J_iᵀ r_i` and the Hessian is `H = Σ J_iᵀ D_i J_i + λ`.

Three estimators of `θ* - θ_{-F}`:

* `influence`: `-H⁻¹ Σ_F g`, the infinitesimal jackknife;
* `alo`: one Newton step on what is left, `-(H - Σ_F JᵀDJ)⁻¹ Σ_F g`, by Woodbury's identity with C rows per example; the refit itself for
  squared errors. For one example the correction is its C × C leverage, `(I - D_j h_j)⁻¹` with `h_j = J_j H⁻¹ J_jᵀ`;
* `newton`: Newton steps until the optimum of what is left.

Examples may take their share of the penalty with them (`per_example`): then λ becomes `λ (n - |F|)/n`, and both the Hessian and the
gradient of what is left know it.

Sources: Pregibon 1981; Rad & Maleki 2020 (approximate leave-one-out); Jaeckel 1972; Giordano et al. 2019 (infinitesimal jackknife).
"""

from abc import ABC, abstractmethod
from typing import Literal, Self

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.exact.losses import Loss

Regulariser = Literal["fixed", "per_example"]
Estimator = Literal["influence", "alo", "newton"]


class GeneralizedLinear(ABC):
    """A linear model at its optimum, as attribution sees it.

    Args:
        features: (n, d).
        targets: what the loss takes.
        parameters: θ*, (C, d).
        penalty: λ of the sum form.
        regulariser: whether λ stays when examples leave (`fixed`) or shrinks with their number (`per_example`).
        pseudo_inverse: leave directions without curvature alone instead of refusing them.

    Raises:
        InvalidInputError: if shapes or targets do not fit, or a number is not finite.
    """

    def __init__(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        parameters: np.ndarray,
        penalty: float,
        *,
        regulariser: Regulariser = "fixed",
        pseudo_inverse: bool = False,
    ) -> None:
        self.features, self.targets = np.asarray(features, np.float64), np.asarray(targets)
        self.parameters = np.asarray(parameters, np.float64)
        self.penalty, self.regulariser, self.pseudo_inverse = penalty, regulariser, pseudo_inverse
        if self.parameters.ndim != 2 or self.features.ndim != 2 or self.parameters.shape[1] != self.features.shape[1]:
            raise InvalidInputError(f"parameters have {self.parameters.shape[-1]} columns, not one per feature")
        if not (np.isfinite(self.features).all() and np.isfinite(self.parameters).all() and 0 <= penalty < np.inf):
            raise InvalidInputError("features and parameters must be finite, the penalty not below 0")
        outputs = self.features @ self.parameters.T
        self.loss = self.loss_of(len(self.parameters))
        self.loss.check(outputs, self.targets)
        self.outputs = outputs  # (n, C)
        self.slopes = self.loss.slopes(outputs, self.targets)  # (n, C)

    @staticmethod
    @abstractmethod
    def loss_of(num_outputs: int) -> Loss:
        """Return the training loss of a model with C outputs."""

    def at(self, parameters: np.ndarray) -> Self:
        """Return the same problem at other parameters."""
        regulariser, pseudo_inverse = self.regulariser, self.pseudo_inverse
        problem = (self.features, self.targets, parameters, self.penalty)
        return type(self)(*problem, regulariser=regulariser, pseudo_inverse=pseudo_inverse)

    def polished(self) -> Self:
        """Return the same problem at its optimum, by Newton steps from here.

        Raises:
            InvalidInputError: if there is no optimum.
            SingularCurvatureError: if there are several and no pseudo-inverse is wanted.
        """
        return self.at(self.refitted(np.empty(0, np.int64)))

    @property
    def num_parameters(self) -> int:
        """P."""
        return self.parameters.size

    def penalty_without(self, count: int) -> float:
        """Return λ after `count` examples have left."""
        share = 1 - count / len(self.features) if self.regulariser == "per_example" else 1.0
        return self.penalty * share

    def gradient(self) -> np.ndarray:
        """Return the gradient (C, d) of the whole objective: 0 at the optimum."""
        total: np.ndarray = self.slopes.T @ self.features + self.penalty * self.parameters
        return total

    def parameter_changes(self, rows: np.ndarray, estimator: Estimator = "alo") -> np.ndarray:
        """Return `θ* - θ_{-j}` for every row j, (rows, P): what having each example did.

        Raises:
            SingularCurvatureError: if the curvature is singular, or would be without an example.
        """
        if estimator == "newton":
            return np.stack([self.group_change(row, "newton") for row in np.reshape(rows, (-1, 1))])
        penalty, slopes, offset = self._one_out(rows, estimator)
        gradients = slopes[:, :, None] * self.features[rows][:, None, :]
        return np.asarray(-(self.solve(gradients, penalty) + offset).reshape(len(rows), -1))

    def scores(self, gradients: np.ndarray, estimator: Literal["influence", "alo"] = "alo") -> np.ndarray:
        """Return `⟨∇m_z, θ* - θ_{-j}⟩` for all n examples, (queries, n), without any example's P numbers.

        Args:
            gradients: ∇m_z, (queries, P).
            estimator: of the change.

        Raises:
            SingularCurvatureError: if the curvature is singular, or would be without an example.
        """
        penalty, slopes, offset = self._one_out(np.arange(len(self.features)), estimator)
        solved = self.solve(gradients.reshape(-1, *self.parameters.shape), penalty)  # (queries, C, d)
        scores = np.tile(-(gradients @ offset.ravel())[:, None], len(self.features))
        for number in range(len(self.parameters)):
            scores -= (solved[:, number] @ self.features.T) * slopes[:, number]
        return scores

    def group_change(self, rows: np.ndarray, estimator: Estimator = "alo") -> np.ndarray:
        """Return `θ* - θ_{-F}` for a group F of rows, (P,).

        Raises:
            SingularCurvatureError: if the curvature is singular, or would be without the group.
            InvalidInputError: if `newton` finds no optimum.
        """
        if estimator == "newton":
            return np.asarray((self.parameters - self.refitted(rows)).ravel())
        penalty = self.penalty if estimator == "influence" else self.penalty_without(len(rows))
        offset = self._released(len(rows), penalty)
        slopes = self.slopes[rows] if estimator == "influence" else self.slopes_together(rows, penalty, offset)
        return np.asarray(-(self.solve(slopes.T @ self.features[rows], penalty) + offset).ravel())

    @abstractmethod
    def refitted(self, rows: np.ndarray) -> np.ndarray:
        """Return the optimum (C, d) without a group of rows."""

    @abstractmethod
    def solve(self, vectors: np.ndarray, penalty: float) -> np.ndarray:
        """Return `(Σ JᵀDJ + λ)⁻¹ v` of vectors (…, C, d).

        Raises:
            SingularCurvatureError: if the curvature is singular.
        """

    @abstractmethod
    def leverages(self, rows: np.ndarray, penalty: float) -> np.ndarray:
        """Return `M_j = L_jᵀ h_j L_j` of each row, (rows, C, C): a trace of 0 for no say in the fit, eigenvalues below 1."""

    @abstractmethod
    def slopes_alone(self, rows: np.ndarray, penalty: float, offset: np.ndarray) -> np.ndarray:
        """Return s (rows, C) so that leaving one row out adds `H⁻¹(J_jᵀ s_j) + offset` to the parameters."""

    @abstractmethod
    def slopes_together(self, rows: np.ndarray, penalty: float, offset: np.ndarray) -> np.ndarray:
        """Return s (rows, C) so that leaving all rows out adds `H⁻¹(Σ J_jᵀ s_j) + offset` to the parameters."""

    def _one_out(self, rows: np.ndarray, estimator: Estimator) -> tuple[float, np.ndarray, np.ndarray]:
        """Return the penalty to solve with, and s and the offset as `slopes_alone` has them."""
        if estimator == "influence":
            return self.penalty, self.slopes[rows], self._released(1, self.penalty)
        penalty = self.penalty_without(1)
        offset = self._released(1, penalty)
        return penalty, self.slopes_alone(rows, penalty, offset), offset

    def _released(self, count: int, penalty: float) -> np.ndarray:
        """Return what the penalty's relief alone adds to the parameters, (C, d)."""
        relief = self.penalty - self.penalty_without(count)
        return self.solve(relief * self.parameters, penalty) if relief else np.zeros_like(self.parameters)
