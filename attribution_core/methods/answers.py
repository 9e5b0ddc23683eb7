"""What is asked of an index, and what it answers: encoded queries, and the best rows of both signs."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from attribution_core.data.batch import Batch
from attribution_core.methods.base import QuerySide


@dataclass(frozen=True)
class Query:
    """Encoded queries: one side per checkpoint, and what the model outputs for them.

    Attributes:
        outputs: `{"value", "prediction", "probability"}` per query; the value is the mean over checkpoints.
        rows: (queries, dim) float32, what stored weighted rows are multiplied with.
        batch: the queries themselves.
        damping: that the sides were preconditioned with; None for methods without.
    """

    outputs: list[dict[str, Any]]
    sides: list[QuerySide]
    rows: np.ndarray
    batch: Batch
    damping: float | None

    def __len__(self) -> int:
        return len(self.outputs)

    def __getitem__(self, part: slice) -> "Query":
        sides = [side[part] for side in self.sides]
        return Query(self.outputs[part], sides, self.rows[part], self.batch[part], self.damping)


@dataclass(frozen=True)
class Found:
    """The best rows of one sign for one query: row numbers and scores, best first."""

    rows: np.ndarray
    scores: np.ndarray

    @classmethod
    def nothing(cls) -> "Found":
        """Return an empty list."""
        return cls(np.empty(0, np.int64), np.empty(0, np.float32))

    def merged(self, other: "Found", k: int, sign: int) -> "Found":
        """Return the k best of both lists."""
        scores = np.concatenate([self.scores, other.scores])
        return top_rows(scores, np.concatenate([self.rows, other.rows]), k, sign)


@dataclass(frozen=True)
class Attribution:
    """Top examples of both signs for one query.

    Attributes:
        approximate: whether an exact scan over all allowed examples could have found others or scored them otherwise.
    """

    output: dict[str, Any]
    positive: Found
    negative: Found
    approximate: bool


def top_rows(scores: np.ndarray, rows: np.ndarray, k: int, sign: int) -> Found:
    """Return the k rows whose scores are furthest on one side of 0; equal scores are ordered by row."""
    keep = sign * scores > 0
    rows, scores = rows[keep], scores[keep]
    order = np.lexsort((rows, -sign * scores))[:k]
    return Found(rows[order], scores[order])
