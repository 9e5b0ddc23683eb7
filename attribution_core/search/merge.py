"""Ranked lists, and how they are merged whatever order they arrive in."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranked:
    """Rows and scores per query, each (queries, k), best first; row -1 where a list is shorter."""

    rows: np.ndarray
    scores: np.ndarray

    @classmethod
    def empty(cls, queries: int) -> "Ranked":
        """Return lists of nothing."""
        return cls(np.empty((queries, 0), np.int64), np.empty((queries, 0), np.float32))


def ordered(found: Ranked, k: int) -> Ranked:
    """Return the k best of each list; equal scores are ordered by row number, so the result is unique."""
    order = np.lexsort((found.rows, -found.scores), axis=1)[:, :k]
    return Ranked(np.take_along_axis(found.rows, order, 1), np.take_along_axis(found.scores, order, 1))


def merged(first: Ranked, second: Ranked, k: int) -> Ranked:
    """Return the k best of both."""
    rows = np.concatenate([first.rows, second.rows], axis=1)
    scores = np.concatenate([first.scores, second.scores], axis=1)
    return ordered(Ranked(rows, scores), k)
