"""Mixture sanity check: queries of one source must not draw their top examples from a disjoint source.

For each query the share of its top k that comes from its own source is held against that source's share of the training set.
"""

from dataclasses import dataclass

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.removal import ranking_of
from attribution_core.evaluate.result import Result


@dataclass(frozen=True)
class MixtureResult(Result):
    """Where top examples come from.

    Attributes:
        own_share: share of top-k places that hold the query's own source, mean over queries.
        base_rate: share expected of places filled at random, mean over queries.
        by_source: own share by the queries' source.
        p_value: of the permutation test: how often permuted training sources give at least this share.
        passed: whether the own share is above the base rate with `p_value < significance`.
        significance: level of the test.
        k: places looked at.
        queries: how many queries.
        permutations: of the test.
        seed: of its generator.
    """

    own_share: float
    base_rate: float
    by_source: dict[str, float]
    p_value: float
    passed: bool
    significance: float
    k: int
    queries: int
    permutations: int
    seed: int


def mixture_check(
    scores: np.ndarray,
    train_sources: np.ndarray,
    query_sources: np.ndarray,
    *,
    k: int = 10,
    significance: float = 0.01,
    permutations: int = 999,
    seed: int = 0,
) -> MixtureResult:
    """Check where the examples of largest score come from.

    The test permutes sources over training examples, the same for all queries, so queries that share top examples are not counted as independent.

    Args:
        scores: (queries, n).
        train_sources: (n,), any labels.
        query_sources: (queries,).
        k: places looked at.
        significance: of the test.
        permutations: of the test.
        seed: of its generator.

    Raises:
        InvalidInputError: if k is not between 1 and n, or there is only one source.
    """
    if not 1 <= k <= scores.shape[1]:
        raise InvalidInputError(f"k must be between 1 and {scores.shape[1]}")
    if len(np.unique(train_sources)) < 2:
        raise InvalidInputError("a mixture check needs training examples of at least two sources")
    top = ranking_of(scores)[:, :k]
    generator = np.random.default_rng(seed)

    def shares(sources: np.ndarray) -> np.ndarray:
        return np.asarray((sources[top] == query_sources[:, None]).mean(1))

    own = shares(train_sources)
    value = float(own.mean())
    drawn = np.array([shares(generator.permutation(train_sources)).mean() for _ in range(permutations)])
    p_value = float((1 + (drawn >= value - 1e-12).sum()) / (1 + permutations))
    base = float((train_sources[None] == query_sources[:, None]).mean())
    return MixtureResult(
        own_share=value,
        base_rate=base,
        by_source={str(source): float(own[query_sources == source].mean()) for source in np.unique(query_sources)},
        p_value=p_value,
        passed=bool(value > base and p_value < significance),
        significance=significance,
        k=k,
        queries=len(scores),
        permutations=permutations,
        seed=seed,
    )
