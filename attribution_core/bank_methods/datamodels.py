"""Datamodels: linear regression of measured outputs on inclusion masks, for all queries at once.

`min_{b,β} (1/2m) ‖f − b − Xβ‖² + λ Ω(β)`, with `Ω = ‖β‖₁` (LASSO; Ilyas et al. 2022, equation 4) or `½‖β‖²` (ridge). λ is chosen for each query by
cross-validation over subsets. The LASSO is solved by FISTA with restarts (Beck & Teboulle 2009; O'Donoghue & Candès 2015): every step is two
products with X that all queries share.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.retrainings import Retrainings

_PATH, _SMALLEST = 12, 0.01
_FOLDS = 5
_Solve = Callable[[np.ndarray, np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class Datamodel:
    """A fitted datamodel.

    Attributes:
        scores: β, (queries, n), in units of the measurement.
        intercepts: b, (queries,).
        penalties: λ, (queries,).
    """

    scores: np.ndarray
    intercepts: np.ndarray
    penalties: np.ndarray

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Return outputs, (queries, subsets), for masks (subsets, n)."""
        predicted: np.ndarray = self.intercepts[:, None] + self.scores @ masks.T.astype(np.float64)
        return predicted


def lasso(
    design: np.ndarray,
    targets: np.ndarray,
    penalties: np.ndarray,
    *,
    start: np.ndarray | None = None,
    tolerance: float = 1e-3,
    max_steps: int = 500,
) -> np.ndarray:
    """Return `argmin (1/2m) ‖f − Xβ‖² + λ‖β‖₁` for every query, (queries, n).

    Stops when every query meets the optimality conditions `|Xᵀ(f − Xβ)/m| ≤ λ`, with equality and sign where β is not 0, to a share `tolerance` of λ.

    Args:
        design: X, (m, n), centred.
        targets: f, (queries, m), centred.
        penalties: λ, (queries,).
        start: β to start from, 0 by default.
        tolerance: of the conditions.
        max_steps: at most.
    """
    m = len(design)
    step = m / max(float(np.linalg.norm(design @ design.T, 2)), np.finfo(float).tiny)
    threshold = penalties[:, None]
    weights = np.zeros((len(targets), design.shape[1])) if start is None else start
    ahead, momentum = weights, np.ones((len(targets), 1))
    for count in range(max_steps):
        gradient = (ahead @ design.T - targets) @ design / m
        moved = ahead - step * gradient
        new = np.sign(moved) * np.maximum(np.abs(moved) - step * threshold, 0)
        grown = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        uphill = ((ahead - new) * (new - weights)).sum(1, keepdims=True) > 0
        ahead = np.where(uphill, new, new + (momentum - 1) / grown * (new - weights))
        momentum = np.where(uphill, 1.0, grown)
        weights = new
        if count % 10 == 9 and (violations(design, targets, weights, penalties) <= tolerance * penalties).all():
            break
    return weights


def violations(design: np.ndarray, targets: np.ndarray, weights: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """Return by how much each query's optimality conditions are missed at worst, (queries,)."""
    slope = (targets - weights @ design.T) @ design / len(design)
    level = penalties[:, None]
    missed = np.where(weights != 0, np.abs(slope - np.sign(weights) * level), np.maximum(np.abs(slope) - level, 0))
    return np.asarray(missed.max(1))


def lasso_datamodel(retrainings: Retrainings, *, folds: int = _FOLDS, path: int = _PATH, seed: int = 0) -> Datamodel:
    """Fit LASSO datamodels of the masks.

    Raises:
        InvalidInputError: if there are fewer than two finished subsets for each fold.
    """
    bank = retrainings.usable
    return cross_validated_lasso(bank.masks.astype(np.float64), bank.means.T, folds=folds, path=path, seed=seed)


def cross_validated_lasso(
    masks: np.ndarray, targets: np.ndarray, *, folds: int = _FOLDS, path: int = _PATH, seed: int = 0
) -> Datamodel:
    """Fit LASSO regressions, λ by cross-validation among `path` values down from where all effects vanish.

    Args:
        masks: what is regressed on, (subsets, n).
        targets: (queries, subsets).
        folds: of the cross-validation.
        path: penalties tried.
        seed: of the folds.

    Raises:
        InvalidInputError: if there are fewer than two subsets for each fold.
    """
    _check(masks, folds)
    design, centred, _, _ = _centred(masks, targets)
    largest = np.abs(centred @ design / len(design)).max(1)  # (queries,)
    largest = np.maximum(largest, np.finfo(float).tiny)
    grid = np.geomspace(1.0, _SMALLEST, path)

    def solve(design: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for share in grid:
            found.append(lasso(design, targets, share * largest, start=found[-1] if found else None))
        return found

    best = _cross_validated(masks, targets, solve, folds, seed)
    solutions = np.stack(solve(design, centred))
    return _datamodel(solutions[best, np.arange(len(best))], masks, targets, grid[best] * largest)


def ridge_datamodel(retrainings: Retrainings, *, folds: int = _FOLDS, path: int = _PATH, seed: int = 0) -> Datamodel:
    """Fit ridge datamodels in their dual form, λ by cross-validation around the masks' mean eigenvalue.

    Raises:
        InvalidInputError: if there are fewer than two finished subsets for each fold.
    """
    bank = retrainings.usable
    masks, targets = bank.masks.astype(np.float64), bank.means.T
    _check(masks, folds)
    design, centred, _, _ = _centred(masks, targets)
    size = float((design**2).sum()) / len(design) ** 2
    grid = size * np.geomspace(1e-2, 1e3, path)

    def solve(design: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
        values, vectors = np.linalg.eigh(design @ design.T / len(design))
        turned = targets @ vectors / len(design)
        return [(turned / (values.clip(min=0) + penalty)) @ vectors.T @ design for penalty in grid]

    best = _cross_validated(masks, targets, solve, folds, seed)
    solutions = np.stack(solve(design, centred))
    return _datamodel(solutions[best, np.arange(len(best))], masks, targets, grid[best])


def _check(masks: np.ndarray, folds: int) -> None:
    if folds < 2 or len(masks) < 2 * folds:
        raise InvalidInputError(f"cross-validation in {folds} folds needs at least {2 * folds} finished subsets")


def _centred(masks: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return masks and targets without their means, and the means: the intercept is not penalised."""
    center, level = masks.mean(0), targets.mean(1)
    return masks - center, targets - level[:, None], center, level


def _cross_validated(masks: np.ndarray, targets: np.ndarray, solve: _Solve, folds: int, seed: int) -> np.ndarray:
    """Return the number of the penalty with least squared error on left-out subsets, for each query, (queries,)."""
    fold = np.random.default_rng(seed).permutation(len(masks)) % folds
    errors: np.ndarray | float = 0.0
    for part in range(folds):
        kept, left = fold != part, fold == part
        design, centred, center, level = _centred(masks[kept], targets[:, kept])
        guesses = [level[:, None] + weights @ (masks[left] - center).T for weights in solve(design, centred)]
        errors = errors + np.stack([((guess - targets[:, left]) ** 2).sum(1) for guess in guesses])
    return np.asarray(np.asarray(errors).argmin(0))


def _datamodel(scores: np.ndarray, masks: np.ndarray, targets: np.ndarray, penalties: np.ndarray) -> Datamodel:
    return Datamodel(scores, targets.mean(1) - scores @ masks.mean(0), penalties)
