"""Exact Shapley values of a k-nearest-neighbour classifier, in n log n for each query.

Utility `v(S) = (1/k) Σ_{j ≤ min(k, |S|)} 1[y_{α_j(S)} = y]`, α sorting S by distance to the query. From the farthest example inwards
`s_{α_n} = 1[y_{α_n} = y] · min(k, n) / (k n)`, `s_{α_i} = s_{α_{i+1}} + (1[y_{α_i} = y] − 1[y_{α_{i+1}} = y]) / k · min(k, i) / i`.
Source: Jia et al. 2019, theorem 1.
"""

import numpy as np

from attribution_core.errors import InvalidInputError


def knn_shapley(similarities: np.ndarray, labels: np.ndarray, query_labels: np.ndarray, k: int) -> np.ndarray:
    """Return Shapley values, (queries, n); they sum to each query's share of right votes among its k nearest.

    Args:
        similarities: the larger the nearer, (queries, n); ties in order of rows.
        labels: (n,).
        query_labels: (queries,).
        k: neighbours.

    Raises:
        InvalidInputError: if k is below 1.
    """
    if k < 1:
        raise InvalidInputError("a nearest-neighbour classifier needs k of at least 1")
    order = np.argsort(-similarities, axis=1, kind="stable")
    right = (labels[order] == query_labels[:, None]).astype(np.float64)  # nearest first
    n = order.shape[1]
    places = np.arange(1, n)
    steps = (right[:, :-1] - right[:, 1:]) / k * np.minimum(k, places) / places
    farthest = right[:, -1:] * min(k, n) / (k * n)
    ranked = np.concatenate([steps[:, ::-1].cumsum(1)[:, ::-1] + farthest, farthest], axis=1)
    values = np.empty_like(ranked)
    np.put_along_axis(values, order, ranked, 1)
    return values
