"""Scores of all pairs of queries and training examples, some queries at a time, so that memory does not grow with their number."""

from itertools import pairwise

import numpy as np

from attribution_core.data.batch import Batch
from attribution_core.methods.dense import ScoredIndex
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.progress import NoProgress, Progress, watched

_MOST = 64
_BYTES = 32 << 20
# Where every lot of queries takes passes over the training set of its own.
_MOST_OF_PASS = 512
_BYTES_OF_PASS = 1 << 30


def all_scores(
    index: LoadedIndex | ScoredIndex,
    batch: Batch,
    damping: float | None = None,
    rows: np.ndarray | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Return the scores of training rows, all by default, for every query of a batch, (queries, rows) float32.

    Args:
        index: what scores.
        batch: the queries.
        damping: the method's default by default.
        rows: numbers of training examples.
        progress: asked between queries whether the work should stop.

    Raises:
        InvalidInputError: if the index cannot score them, or naming a row that does not exist.
        Cancelled: if the work should stop.
    """
    progress = progress or NoProgress()
    rows = np.arange(index.num_examples) if rows is None else rows
    found = []
    for start, stop in watched(_lots(len(batch), _queries_at_once(index)), progress):
        query = index.query(batch[start:stop], damping)
        found.append(index.scores(query, rows, rescore=True, progress=progress))
    return np.concatenate(found)


def _lots(count: int, most: int) -> list[tuple[int, int]]:
    """Return as few ranges of no more than so many as there can be, of about one size."""
    bounds = np.linspace(0, count, -(-count // most) + 1).round().astype(int).tolist()
    return list(pairwise(bounds))


def _queries_at_once(index: LoadedIndex | ScoredIndex) -> int:
    """Return how many queries to score together, by the bytes of their solved gradients under all checkpoints."""
    if isinstance(index, ScoredIndex):
        return _MOST
    by_pass = index.rescores or any(member.solves_by_passes for member in index.members)
    most, size = (_MOST_OF_PASS, _BYTES_OF_PASS) if by_pass else (_MOST, _BYTES)
    each = 4 * sum(member.checkpoint.capture.num_parameters for member in index.members)
    return max(1, min(most, size // each))
