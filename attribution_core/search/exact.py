"""The reference search: every row against every query, block by block, in bounded memory."""

from collections.abc import Iterable

import numpy as np

from attribution_core.search.merge import Ranked, merged


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
