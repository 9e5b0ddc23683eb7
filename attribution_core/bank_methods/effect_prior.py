"""What is believed of the effects before retraining: `Cov(δ_z) = diag(d_z) + Gᵀ diag(h_z) G`.

`d_zi` grows with `|τ_i(z)|`: where a method sees no effect there is likely none. G holds every query's scores, scaled to unit norm, so what a query's own
scores miss can be found among the scores of queries like it: `h_{z,z'} = |cos(τ_z, τ_z')|`. The second part is what queries share: rank at most `queries`.
"""

from dataclasses import dataclass

import numpy as np

_SAME = 1e-9


@dataclass(frozen=True)
class EffectPrior:
    """A covariance of effects for each query.

    Attributes:
        own: d, (queries, n), not negative.
        directions: G, (directions, n).
        shared: h, (queries, directions), not negative.
    """

    own: np.ndarray
    directions: np.ndarray
    shared: np.ndarray

    @classmethod
    def of_magnitudes(cls, magnitudes: np.ndarray) -> "EffectPrior":
        """Return the part of each query's own, with variances (queries, n)."""
        return cls(magnitudes, np.zeros((0, magnitudes.shape[1])), np.zeros((len(magnitudes), 0)))

    @classmethod
    def of_neighbours(cls, scores: np.ndarray, directions: np.ndarray) -> "EffectPrior":
        """Return the part that queries share, from scores (queries, n) and a pool's unit directions (pool, n).

        A query that is not of the pool has its own scores as one more direction, for itself alone.
        """
        own = unit_rows(scores)
        near = np.abs(own @ directions.T)  # (queries, pool)
        fresh = np.flatnonzero(near.max(1) < 1 - _SAME)
        alone = np.zeros((len(scores), len(fresh)))
        alone[fresh, np.arange(len(fresh))] = 1
        return cls(np.zeros_like(scores), np.concatenate([directions, own[fresh]]), np.hstack([near, alone]))

    def scaled(self, factors: np.ndarray) -> "EffectPrior":
        """Return the covariance times each query's factor (queries,)."""
        return EffectPrior(self.own * factors[:, None], self.directions, self.shared * factors[:, None])

    def plus(self, other: "EffectPrior") -> "EffectPrior":
        """Return the sum of two covariances."""
        directions = np.concatenate([self.directions, other.directions])
        return EffectPrior(self.own + other.own, directions, np.concatenate([self.shared, other.shared], axis=1))

    def between(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return `L Cov(δ_z) Rᵀ` for L (a, n) and R (b, n): (queries, a, b)."""
        both_left = np.hstack([left, left @ self.directions.T])
        both_right = both_left if right is left else np.hstack([right, right @ self.directions.T])
        found = np.empty((len(self.own), len(left), len(right)))
        for query, variances in enumerate(np.hstack([self.own, self.shared])):
            roots = both_left * np.sqrt(variances)
            # A matrix times its own transpose is symmetric, and costs half of a product.
            found[query] = roots @ (roots.T if right is left else (both_right * np.sqrt(variances)).T)
        return found

    def variances(self, contrasts: np.ndarray) -> np.ndarray:
        """Return `cᵀ Cov(δ_z) c` for rows c of (a, n): (queries, a)."""
        seen: np.ndarray = self.own @ (contrasts**2).T + self.shared @ ((contrasts @ self.directions.T) ** 2).T
        return seen

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Return `Cov(δ_z) v_z` for v (queries, n)."""
        applied: np.ndarray = self.own * vectors + (self.shared * (vectors @ self.directions.T)) @ self.directions
        return applied


def unit_rows(scores: np.ndarray) -> np.ndarray:
    """Return rows scaled to unit norm; zeros stay zeros."""
    norms = np.linalg.norm(scores, axis=1, keepdims=True)
    return np.asarray(np.divide(scores, norms, out=np.zeros_like(scores), where=norms > 0))
