"""Shapley and Beta Shapley values from retrainings on subsets of varied sizes, each of which informs every example.

`φ_i = Σ_s w_s E[f(S ∪ i) − f(S)]`, S being s of the other n − 1 examples at random, `w_s = C(n−1, s) B(s + β, n−1−s + α) / B(α, β)`; α = β = 1 is
Shapley, `w_s = 1/n`. With μ_a the mean of f over subsets of a examples and c_{a,i} its covariance there with keeping i,
`E[f | i ∈ S] = μ_a + c_{a,i} n/a` and `E[f | i ∉ S] = μ_a − c_{a,i} n/(n−a)`, hence

    φ_i = Σ_a (w_{a−1} − w_a) μ_a + Σ_a κ_a c_{a,i},    κ_a = n (w_{a−1}/a + w_a/(n−a)).

The first sum is the same for all examples; for Shapley it is `(f(all) − f(none))/n`, and the second sums to 0 over examples: that is efficiency.
m subsets of sizes from a law q give both: `1/m Σ_j κ(a_j)/q(a_j) e_j (x_{ji} − a_j/n)`, with x the mask and `e_j = f_j − ĝ_{−j}(a_j)`, ĝ a polynomial of the
size fitted to all subsets but j. Whatever ĝ is, it does not depend on x_j, so the estimate is unbiased; the better it fits, the less what a subset's
size is worth counts as noise. If sizes explain all but a standard deviation s of f, a Shapley value's is about `π s/√m` (a Banzhaf value's `2 s/√m`).

Sources: Kwon & Zou 2022, equation 5 (weights); Wang & Jia 2023, a note on group testing, and Li & Yu 2024 (every subset used for every example);
Witter, Liu & Musco 2025 (regression adjustment).
"""

from dataclasses import dataclass
from math import lgamma

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.retrainings import Retrainings
from attribution_core.training.sizes import size_law

_DEGREE = 3
_SIZES_PER_COEFFICIENT = 3
_RIDGE = 1e-3
LEAST_EFFECTIVE = 10
# Between the cumulative laws of sizes as they should be and are; ten subsets of one bank are far nearer, sizes of one share farther.
_WIDEST_GAP = 0.25


@dataclass(frozen=True)
class SizeWeights:
    """What a semivalue asks of subsets of each size.

    Attributes:
        level: `w_{a−1} − w_a` of the mean, (n + 1,).
        contrast: κ_a of the covariance, (n + 1,); 0 for none and all.
    """

    level: np.ndarray
    contrast: np.ndarray

    @classmethod
    def beta(cls, n: int, alpha: float, beta: float) -> "SizeWeights":
        """Return those of Beta Shapley: the larger α, the more small subsets count; the larger β, the more large ones."""
        return cls.of(_beta_weights(n, alpha, beta))

    @classmethod
    def of(cls, weights: np.ndarray) -> "SizeWeights":
        """Return those of any semivalue, given w_s of the marginal contributions to subsets of s = 0 … n − 1, (n,)."""
        n = len(weights)
        sizes = np.arange(1, n)
        contrast = np.zeros(n + 1)
        contrast[1:n] = n * (weights[:-1] / sizes + weights[1:] / (n - sizes))
        return cls(-np.diff(weights, prepend=0.0, append=0.0), contrast)

    def effective(self, sizes: np.ndarray) -> float:
        """Return how many subsets of equal weight say as much as those of given sizes, (Σ ω)²/Σ ω²; as many as there are for Shapley."""
        n = len(self.level) - 1
        inner = _inner(sizes, n)
        omega = self.contrast[inner] / size_law(n)[inner] * np.sqrt(inner * (n - inner))
        return float(omega.sum() ** 2 / (omega**2).sum()) if omega.any() else 0.0


def data_shapley(retrainings: Retrainings) -> np.ndarray:
    """Return Shapley values, (queries, n), in units of the measurement; they sum to that of all examples minus that of none.

    Raises:
        InvalidInputError: as `beta_shapley`.
    """
    return beta_shapley(retrainings, 1.0, 1.0)


def beta_shapley(retrainings: Retrainings, alpha: float, beta: float) -> np.ndarray:
    """Return Beta Shapley values, (queries, n), in units of the measurement.

    Args:
        retrainings: on no example, on all, and on subsets whose sizes follow `size_law`.
        alpha: the larger, the more small subsets count.
        beta: the larger, the more large ones count.

    Raises:
        InvalidInputError: if retrainings on nothing or everything are missing, or the others hardly have the sizes that count.
    """
    weights = SizeWeights.beta(retrainings.masks.shape[1], alpha, beta)
    check_sizes(retrainings.usable.masks.sum(1), weights)
    return semivalues(retrainings, weights)


def check_sizes(sizes: np.ndarray, weights: SizeWeights) -> None:
    """Refuse subsets that do not tell the values apart.

    Args:
        sizes: of all subsets, (subsets,).
        weights: of the values.

    Raises:
        InvalidInputError: if they are of other sizes than the law's, or those that count are worth fewer than ten.
    """
    law = size_law(len(weights.level) - 1)
    seen = np.bincount(_inner(sizes, len(law) - 1), minlength=len(law))
    gap = np.abs(np.cumsum(law) - np.cumsum(seen) / max(seen.sum(), 1)).max()
    if gap > _WIDEST_GAP:
        raise InvalidInputError("Shapley values need retrainings on subsets of varied sizes, small and large")
    effective = weights.effective(sizes)
    if effective < LEAST_EFFECTIVE:
        raise InvalidInputError(
            f"few subsets are of the sizes that count: they are worth {effective:.1f}, and {LEAST_EFFECTIVE} are needed: name more"
        )


def semivalues(retrainings: Retrainings, weights: SizeWeights) -> np.ndarray:
    """Return an unbiased estimate of any semivalue, (queries, n), in units of the measurement.

    Args:
        retrainings: on no example, on all, and on subsets whose sizes follow `size_law`, two at least.
        weights: of the semivalue.

    Raises:
        InvalidInputError: if one of these did not finish.
    """
    bank = retrainings.usable
    n, sizes = bank.masks.shape[1], bank.masks.sum(1)
    inner = (sizes > 0) & (sizes < n)
    if inner.sum() < 2 or not ((sizes == 0).any() and (sizes == n).any()):
        raise InvalidInputError(
            "Shapley values need finished retrainings on no example, on all, and on subsets between"
        )
    level = sum(weights.level[size] * bank.means[sizes == size].mean(0) for size in (0, n))  # (queries,)
    masks, values, sizes = bank.masks[inner], bank.means[inner].T, sizes[inner]  # values (queries, m)
    curve = _SizeCurve(sizes, n)
    errors = curve.errors(values)
    scaled = errors / (len(sizes) * size_law(n)[sizes])
    level = level + curve.summed(values, errors, weights.level[1:n]) + scaled @ weights.level[sizes]
    return np.asarray(level[:, None] + (scaled * weights.contrast[sizes]) @ (masks - sizes[:, None] / n))


class _SizeCurve:
    """Polynomials of `(2/π) arcsin √(a/n)`, in which sizes are spread evenly, by least squares with a trace of a ridge.

    Their degree depends on n alone: if it followed the sizes seen, the fit without a subset would know of that one's.

    Attributes:
        functions: at sizes 1 … n − 1, (n − 1, coefficients).
        seen: at the subsets' sizes, (m, coefficients).
        solved: what takes values to coefficients, (m, coefficients).
    """

    def __init__(self, sizes: np.ndarray, n: int) -> None:
        degree = min(_DEGREE, (n - 1) // _SIZES_PER_COEFFICIENT)
        places = 4 / np.pi * np.arcsin(np.sqrt(np.arange(1, n) / n)) - 1
        self.functions = np.polynomial.legendre.legvander(places, degree)
        self.seen = self.functions[sizes - 1]
        ridge = _RIDGE * np.diag(np.arange(degree + 1) > 0)
        self.solved = np.linalg.solve(self.seen.T @ self.seen + ridge, self.seen.T).T

    def errors(self, values: np.ndarray) -> np.ndarray:
        """Return each value minus what the fit to the others says of its size, (queries, m)."""
        leverages = (self.seen * self.solved).sum(1)
        return np.asarray((values - (values @ self.solved) @ self.seen.T) / (1 - leverages))

    def summed(self, values: np.ndarray, errors: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return `Σ_a weights_a ĝ_{−j}(a)` over sizes 1 … n − 1, mean over j, (queries,)."""
        return np.asarray((values - errors / values.shape[1]) @ (self.solved @ (weights @ self.functions)))


def _inner(sizes: np.ndarray, n: int) -> np.ndarray:
    return sizes[(sizes > 0) & (sizes < n)]


def _beta_weights(n: int, alpha: float, beta: float) -> np.ndarray:
    """Return w_s, (n,), which sum to 1."""
    others = n - 1
    logs = [lgamma(n) - lgamma(s + 1) - lgamma(n - s) + lgamma(s + beta) + lgamma(others - s + alpha) for s in range(n)]
    common = lgamma(alpha + beta) - lgamma(alpha) - lgamma(beta) - lgamma(others + alpha + beta)
    return np.exp(np.array(logs) + common)
