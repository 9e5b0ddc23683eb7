"""The reference search: every row against every query, block by block, in bounded memory."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from attribution_core.search.merge import Ranked, merged


class Blocks(Protocol):
    """Rows that are read block by block."""

    def weighted_blocks(self) -> Iterable[tuple[int, np.ndarray]]:
        """Yield `(first row, rows)` from the first to the last, float32."""


class BlockSearch:
    """Exhaustive search that reads the rows anew every time, so that one block of them is in memory at once.

    For few searches: a single query takes several times as long as over rows in memory (`docs/studies/search.md`).
    """

    exhaustive = True

    def __init__(self, rows: Blocks) -> None:
        self._rows = rows

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Ranked:
        """Return the k allowed rows of largest inner product per query, (queries, ≤ k), equal scores by row number."""
        return exact_top(queries, self._rows.weighted_blocks(), k, allowed)


def exact_top(
    queries: np.ndarray, blocks: Iterable[tuple[int, np.ndarray]], k: int, allowed: np.ndarray | None = None
) -> Ranked:
    """Return the k largest inner products of each query with the allowed rows.

    Args:
        queries: (queries, d) float32.
        blocks: `(first row, rows (count, d))`.
        k: how many; fewer come back where fewer rows are allowed.
        allowed: (rows,) bool, all by default.

    Returns:
        Row numbers and scores, best first, ties by row number.
    """
    best = Ranked.empty(len(queries))
    for start, rows in blocks:
        numbers = np.arange(start, start + len(rows))
        scores = queries @ rows.T  # (queries, count)
        if allowed is not None:
            keep = allowed[start : start + len(rows)]
            numbers, scores = numbers[keep], scores[:, keep]
        best = merged(best, Ranked(np.broadcast_to(numbers, scores.shape), scores), k)
    return best
