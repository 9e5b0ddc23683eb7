"""Variances of known covariance shapes by marginal likelihood, pooled over queries, with a common mean profiled out.

`y_z ~ N(A_z w, M_z)`, `M_z = Σ_p e^{θ_p} B_{p,z} + s_z² I`. Given θ, w is generalised least squares over all queries; θ climbs by Fisher scoring:
`∂L/∂θ_p = ½ Σ_z [α_zᵀ P_z α_z − tr(M_z⁻¹ P_z)]`, `F_pq = ½ Σ_z tr(M_z⁻¹ P_z M_z⁻¹ Q_z)` with `P = e^{θ_p} B_p`, `α = M⁻¹(y − A w)`.
Source: Patterson & Thompson 1971; Rasmussen & Williams 2006, equation 5.9.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_STEPS = 60
_LONGEST = 2.0
_FLOOR, _ROOF = -25.0, 10.0
_SETTLED = 1e-5
_COLLINEAR = 1e-4


@dataclass(frozen=True)
class Components:
    """Where a climb ended.

    Attributes:
        variances: e^θ, (components,).
        weights: w, (regressors,).
        log_likelihood: summed over queries.
        alphas: M⁻¹(y − A w), (queries, m).
        inverses: M⁻¹, (queries, m, m).
    """

    variances: np.ndarray
    weights: np.ndarray
    log_likelihood: float
    alphas: np.ndarray
    inverses: np.ndarray


def generalised_least_squares(regressors: np.ndarray, inverses: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the w common to all queries; directions that regressors leave undetermined shrink to 0.

    Args:
        regressors: A, (queries, m, regressors).
        inverses: M⁻¹, (queries, m, m).
        targets: y, (queries, m).
    """
    solved = inverses @ regressors
    normal = (solved.swapaxes(1, 2) @ regressors).sum(0)
    right = (solved.swapaxes(1, 2) @ targets[:, :, None]).sum(0)[:, 0]
    scale = np.sqrt(np.diagonal(normal).clip(min=np.finfo(float).tiny))
    scaled = normal / np.outer(scale, scale) + _COLLINEAR * np.eye(len(scale))
    weights: np.ndarray = np.linalg.solve(scaled, right / scale) / scale
    return weights


@dataclass(frozen=True)
class Problem:
    """What is to be explained.

    Attributes:
        shapes: B_p, each (queries, m, m), positive semi-definite, their sum definite.
        targets: y, (queries, m).
        regressors: A, (queries, m, regressors).
        known: s², variance known beforehand, (queries,).
    """

    shapes: Sequence[np.ndarray]
    targets: np.ndarray
    regressors: np.ndarray
    known: np.ndarray


def at(variances: np.ndarray, problem: Problem) -> Components:
    """Return the model at given variances."""
    targets, regressors = problem.targets, problem.regressors
    total = _total(variances, problem)
    lower = np.linalg.cholesky(total)
    inverses = np.linalg.inv(total)
    weights = generalised_least_squares(regressors, inverses, targets)
    residuals = targets - regressors @ weights
    alphas = (inverses @ residuals[:, :, None])[:, :, 0]
    determinant = 2 * float(np.log(np.diagonal(lower, axis1=1, axis2=2)).sum())
    squares = float((residuals * alphas).sum())
    value = -(determinant + squares + residuals.size * float(np.log(2 * np.pi))) / 2
    return Components(variances, weights, value, alphas, inverses)


def maximise(start: np.ndarray, problem: Problem) -> Components:
    """Climb the marginal likelihood from given variances (components,), above 0, to where it is flat."""
    found = at(start, problem)
    for _ in range(_STEPS):
        higher = _longest_rise(found, _scoring_step(found, problem.shapes), problem)
        if higher is None:
            break
        risen, found = higher.log_likelihood - found.log_likelihood, higher
        if risen < _SETTLED * len(problem.targets):
            break
    return found


def _total(variances: np.ndarray, problem: Problem) -> np.ndarray:
    """Return M, (queries, m, m)."""
    total = problem.known[:, None, None] * np.eye(problem.targets.shape[1])
    for variance, shape in zip(variances, problem.shapes, strict=True):
        total = total + variance * shape
    return total


def _scoring_step(found: Components, shapes: Sequence[np.ndarray]) -> np.ndarray:
    parts = [variance * (found.inverses @ shape) for variance, shape in zip(found.variances, shapes, strict=True)]
    fits = [
        variance * float((found.alphas * (shape @ found.alphas[:, :, None])[:, :, 0]).sum())
        for variance, shape in zip(found.variances, shapes, strict=True)
    ]
    slope = np.array(
        [(fit - np.trace(part, axis1=1, axis2=2).sum()) / 2 for fit, part in zip(fits, parts, strict=True)]
    )
    turned = [part.swapaxes(1, 2) for part in parts]
    information = np.array([[float((left * right).sum()) / 2 for right in turned] for left in parts])
    ridge = 1e-3 * np.diagonal(information) + 1e-6 * len(found.alphas)
    step: np.ndarray = np.linalg.solve(information + np.diag(ridge), slope).clip(-_LONGEST, _LONGEST)
    return step


def _longest_rise(found: Components, step: np.ndarray, problem: Problem) -> Components | None:
    place, length = np.log(found.variances), 1.0
    while length > 1e-3:
        tried = at(np.exp((place + length * step).clip(_FLOOR, _ROOF)), problem)
        if tried.log_likelihood > found.log_likelihood:
            return tried
        length /= 2
    return None
