"""The optimum of a penalised convex loss by Newton's method, and solving with its curvature.

Up to 1,024 parameters the curvature is formed; of more, steps are found by conjugate gradients, which multiply by it and never hold it. Source: Nocedal &
Wright 2006, algorithm 7.1.
"""

from collections.abc import Callable

import numpy as np

from attribution_core.errors import InvalidInputError, SingularCurvatureError
from attribution_core.exact.losses import Loss

_SINGULAR = 1e-12
_STILL = 1e-6
# The side of a curvature that is formed and factorised in less time than multiplying by it takes.
FORMED = 1024
_STEPS_WITHIN, _RESIDUAL = 1000, 1e-3


class Eigen:
    """A symmetric positive semi-definite matrix K, decomposed once so that K + λ is inverted for any λ.

    Args:
        matrix: (k, k).
        pseudo_inverse: leave directions without curvature alone instead of refusing them.
    """

    def __init__(self, matrix: np.ndarray, *, pseudo_inverse: bool = False) -> None:
        self.values, self.vectors = np.linalg.eigh(matrix)
        self.pseudo_inverse = pseudo_inverse

    def inverse_values(self, penalty: float) -> np.ndarray:
        """Return the eigenvalues of `(K + λ)⁻¹`, (k,).

        Raises:
            SingularCurvatureError: if K + λ is singular and no pseudo-inverse is wanted.
        """
        values = self.values.clip(min=0) + penalty
        usable = values > _SINGULAR * values.max()
        if not usable.all() and not self.pseudo_inverse:
            raise SingularCurvatureError(
                f"the curvature leaves {int((~usable).sum())} of {len(values)} directions undetermined: "
                "use a penalty above 0, or the pseudo-inverse"
            )
        return np.where(usable, 1 / np.where(usable, values, 1), 0)

    def solve(self, vectors: np.ndarray, penalty: float) -> np.ndarray:
        """Return `(K + λ)⁻¹ v` over the last axis of (…, k)."""
        solved: np.ndarray = ((vectors @ self.vectors) * self.inverse_values(penalty)) @ self.vectors.T
        return solved

    def inverse_root(self, penalty: float) -> np.ndarray:
        """Return R (k, k) with `R Rᵀ = (K + λ)⁻¹`."""
        root: np.ndarray = self.vectors * np.sqrt(self.inverse_values(penalty))
        return root


def solve_remaining(leverages: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return `(I - M)⁻¹ b` for symmetric leverages M (…, k, k) and b (…, k, columns).

    Raises:
        SingularCurvatureError: if an eigenvalue of M is 1: what is left determines the model no longer.
    """
    values, vectors = np.linalg.eigh(leverages)
    if values.size and values.max() > 1 - _SINGULAR:
        raise SingularCurvatureError(
            "without these examples the model is not determined (leverage 1): use a penalty above 0"
        )
    solved: np.ndarray = vectors @ ((vectors.swapaxes(-1, -2) @ right) / (1 - values)[..., None])
    return solved


def solve_without(rooted: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return `(I - TTᵀ)⁻¹ b` for T (m, k), in whichever of its two sizes is smaller (Woodbury's identity).

    Raises:
        SingularCurvatureError: if what is left determines the model no longer.
    """
    if len(rooted) <= rooted.shape[1]:
        return solve_remaining(rooted @ rooted.T, right)
    return np.asarray(right + rooted @ solve_remaining(rooted.T @ rooted, rooted.T @ right))


def hessian(features: np.ndarray, roots: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return `Σ w_i (L_i L_iᵀ) ⊗ x_i x_iᵀ`, (C·d, C·d), for parameters laid out class by class.

    Args:
        features: (n, d).
        roots: L, (n, C, C).
        weights: (n,), 1 by default.
    """
    bends = roots @ roots.swapaxes(1, 2)  # (n, C, C)
    if weights is not None:
        bends = bends * weights[:, None, None]
    width, dim = roots.shape[1], features.shape[1]
    total = np.empty((width, dim, width, dim))
    for a in range(width):
        for b in range(a, width):
            total[a, :, b] = features.T @ (features * bends[:, a, b, None])
            total[b, :, a] = total[a, :, b]
    return total.reshape(width * dim, width * dim)


def minimise(
    loss: Loss,
    features: np.ndarray,
    targets: np.ndarray,
    penalty: float,
    start: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    tolerance: float = 1e-12,
    max_steps: int = 200,
) -> np.ndarray:
    """Return the minimiser (C, d) of `Σ w_i ℓ_i(θ) + (λ/2) ‖θ‖²`; of several, the one nearest to `start`.

    Args:
        loss: ℓ as a function of outputs.
        features: (n, d).
        targets: what the loss takes.
        penalty: λ.
        start: (C, d), where the iteration starts.
        weights: (n,), 1 by default.
        tolerance: of the gradient's norm, as a share of `Σ w_i ‖x_i‖ + λ‖θ‖`.
        max_steps: Newton steps before giving up.

    Raises:
        InvalidInputError: if the iteration does not get there, as when classes can be separated and nothing is penalised.
    """
    weights = np.ones(len(features)) if weights is None else weights
    scale = float(weights @ np.linalg.norm(features, axis=1))

    def value(theta: np.ndarray) -> float:
        return float(weights @ loss.values(features @ theta.T, targets) + penalty / 2 * (theta**2).sum())

    theta = start
    for _ in range(max_steps):
        outputs = features @ theta.T
        gradient = (weights[:, None] * loss.slopes(outputs, targets)).T @ features + penalty * theta
        step = _newton_direction(features, loss.roots(outputs), weights, gradient, penalty)
        length = np.linalg.norm(theta)
        flat = np.linalg.norm(gradient) <= tolerance * (scale + penalty * length)
        # Far out on separable classes the gradient vanishes too, but steps do not.
        if flat and np.linalg.norm(step) <= _STILL * (1 + length):
            return theta
        theta = _shortened(value, theta, step, float((step * gradient).sum()))
    raise InvalidInputError(
        f"no optimum within {max_steps} Newton steps: with separable classes there is none without a penalty"
    )


def _newton_direction(
    features: np.ndarray, roots: np.ndarray, weights: np.ndarray, gradient: np.ndarray, penalty: float
) -> np.ndarray:
    """Return `(Σ w_i (L_i L_iᵀ) ⊗ x_i x_iᵀ + λ)⁻¹ ∇`, (C, d); by conjugate gradients as exactly as is of use so far from the optimum."""
    if penalty > 0 and gradient.size > FORMED:
        return _iterated(features, roots * np.sqrt(weights)[:, None, None], gradient, penalty)
    curvature = hessian(features, roots, weights)
    if penalty > 0:
        solved = np.linalg.solve(curvature + penalty * np.eye(len(curvature)), gradient.ravel())
    else:
        solved = Eigen(curvature, pseudo_inverse=True).solve(gradient.ravel(), 0.0)
    return np.asarray(solved.reshape(gradient.shape))


def _iterated(features: np.ndarray, roots: np.ndarray, gradient: np.ndarray, penalty: float) -> np.ndarray:
    """Return the same direction, one of descent wherever the iteration ends, preconditioned by the curvature's diagonal.

    This package does without torch, and so without the solvers of `curvature`.
    """
    scale = np.einsum("ica,ica->ic", roots, roots).T @ features**2 + penalty  # (C, d)
    solution, residual, direction, alignment = np.zeros_like(gradient), gradient, np.zeros_like(gradient), 1.0
    for _ in range(_STEPS_WITHIN):
        if np.linalg.norm(residual) <= _RESIDUAL * np.linalg.norm(gradient):
            break
        turned = residual / scale
        following = float((residual * turned).sum())
        direction = turned + following / alignment * direction
        outputs = roots @ (roots.swapaxes(1, 2) @ (features @ direction.T)[:, :, None])
        moved = outputs[:, :, 0].T @ features + penalty * direction
        step, alignment = following / float((direction * moved).sum()), following
        solution, residual = solution + step * direction, residual - step * moved
    return solution


def _shortened(
    value: Callable[[np.ndarray], float], theta: np.ndarray, step: np.ndarray, decrement: float
) -> np.ndarray:
    """Return `θ - t·step` for the first t of 1, ½, ¼ … that lowers the objective enough, or changes it by rounding only."""
    before, length = value(theta), 1.0
    rounding = _SINGULAR * (1 + abs(before))
    while length > _SINGULAR and value(theta - length * step) > before - length * decrement / 4 + rounding:
        length /= 2
    return theta - length * step
