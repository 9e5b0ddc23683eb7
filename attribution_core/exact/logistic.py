"""Logistic regression: one logit for two classes, or softmax over C classes with C·d parameters.

The softmax leaves a direction per feature undetermined (adding the same vector to every class changes nothing), so without a penalty it needs the
pseudo-inverse, which is exact for probabilities and what depends on them alone: margin, log-likelihood and loss, but not a single logit.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Self

import numpy as np

from attribution_core.exact.glm import GeneralizedLinear, Regulariser
from attribution_core.exact.losses import BinaryCrossEntropy, CrossEntropy
from attribution_core.exact.newton import Eigen, hessian, minimise, solve_remaining, solve_without

_CHUNK = 1 << 23  # numbers held at once while leverages are computed


class LogisticRegression(GeneralizedLinear):
    """Cross-entropy; targets (n,) of classes, parameters (1, d) for two classes or (C, d). Arguments as in `GeneralizedLinear`."""

    @staticmethod
    def loss_of(num_outputs: int) -> BinaryCrossEntropy | CrossEntropy:
        """Return the loss of one logit, or of a softmax."""
        return BinaryCrossEntropy() if num_outputs == 1 else CrossEntropy()

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        targets: np.ndarray,
        penalty: float,
        *,
        num_outputs: int,
        regulariser: Regulariser = "fixed",
        pseudo_inverse: bool = False,
    ) -> Self:
        """Return the model at its optimum, with `num_outputs` logits (1 for a binary model).

        Raises:
            InvalidInputError: if there is no optimum.
        """
        start = np.zeros((num_outputs, features.shape[1]))
        parameters = minimise(cls.loss_of(num_outputs), features, targets, penalty, start)
        return cls(features, targets, parameters, penalty, regulariser=regulariser, pseudo_inverse=pseudo_inverse)

    def solve(self, vectors: np.ndarray, penalty: float) -> np.ndarray:
        """Return `H⁻¹ v`."""
        flat = vectors.reshape(*vectors.shape[:-2], -1)
        return self._eigen.solve(flat, penalty).reshape(vectors.shape)

    def leverages(self, rows: np.ndarray, penalty: float) -> np.ndarray:
        """Return `L_jᵀ J_j H⁻¹ J_jᵀ L_j`."""
        found = [rooted @ rooted.swapaxes(1, 2) for rooted in self._rooted(rows, penalty)]
        return np.concatenate(found) if found else np.empty((0, *self.roots.shape[1:]))

    def slopes_alone(self, rows: np.ndarray, penalty: float, offset: np.ndarray) -> np.ndarray:
        """Return `r_j + L_j (I - M_j)⁻¹ L_jᵀ J_j H⁻¹ (g_j + relief)`: `(I - D_j h_j)⁻¹ r_j` where the penalty stays."""
        features, roots = self.features[rows], self.roots[rows]
        gradients = self.slopes[rows][:, :, None] * features[:, None, :]
        moved = np.einsum("mcd,md->mc", self.solve(gradients, penalty) + offset, features)
        right = roots.swapaxes(1, 2) @ moved[:, :, None]
        return np.asarray(self.slopes[rows] + (roots @ solve_remaining(self.leverages(rows, penalty), right))[:, :, 0])

    def slopes_together(self, rows: np.ndarray, penalty: float, offset: np.ndarray) -> np.ndarray:
        """Return `r_F + L (I - M)⁻¹ Lᵀ J H⁻¹ (Σ g_j + relief)` with M (rows·C, rows·C)."""
        features, roots = self.features[rows], self.roots[rows]
        step = self.solve(self.slopes[rows].T @ features, penalty) + offset
        right = roots.swapaxes(1, 2) @ (features @ step.T)[:, :, None]  # (rows, C, 1)
        rooted = [part.reshape(-1, self.num_parameters) for part in self._rooted(rows, penalty)]
        inner = solve_without(np.concatenate(rooted), right.reshape(-1, 1)) if rooted else right
        return np.asarray(self.slopes[rows] + (roots @ inner.reshape(right.shape))[:, :, 0])

    def refitted(self, rows: np.ndarray) -> np.ndarray:
        """Return the optimum without a group of rows, by Newton steps from θ*."""
        rest = np.delete(np.arange(len(self.features)), rows)
        penalty = self.penalty_without(len(self.features) - len(rest))
        return minimise(self.loss, self.features[rest], self.targets[rest], penalty, self.parameters)

    @cached_property
    def roots(self) -> np.ndarray:
        """The losses' curvature roots L, (n, C, C)."""
        return self.loss.roots(self.outputs)

    @cached_property
    def _eigen(self) -> Eigen:
        return Eigen(hessian(self.features, self.roots), pseudo_inverse=self.pseudo_inverse)

    def _rooted(self, rows: np.ndarray, penalty: float) -> Iterator[np.ndarray]:
        """Yield `L_jᵀ J_j H^{-1/2}` of consecutive parts of the rows, (part, C, P)."""
        width, dim = self.parameters.shape
        inverse_root = self._eigen.inverse_root(penalty).reshape(width, dim, -1)
        size = max(1, _CHUNK // (width * self.num_parameters))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            columns = [self.features[part] @ inverse_root[number] for number in range(width)]
            yield self.roots[part].swapaxes(1, 2) @ np.stack(columns, axis=1)
