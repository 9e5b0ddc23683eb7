"""How much of the exact top-k the first search stage finds, measured when an index is built.

The queries are training rows, spread evenly. Their exact scores are computed while features are, from the gradients that are there anyway.
"""

from collections.abc import Callable

import numpy as np

from attribution_core.methods.answers import Query, top_rows
from attribution_core.methods.context import RECALL_QUERIES
from attribution_core.methods.loaded import LoadedIndex
from attribution_core.sampling import evenly_spread

TOP = 10


def recall_rows(training_rows: np.ndarray) -> np.ndarray:
    """Return the training rows that are asked for."""
    rows: np.ndarray = training_rows[evenly_spread(len(training_rows), RECALL_QUERIES)]
    return rows


def measured_recall(index: LoadedIndex, queries: Callable[[], Query], exact: Callable[[Query], np.ndarray]) -> float:
    """Return the mean share of the exact top 10 of both signs among the candidates.

    Whatever comes between counts: the projection, the type that rows are stored in, clusters that are not visited, short codes.

    Args:
        index: asked for candidates.
        queries: returns those of `recall_rows`; asked only where there is a first stage.
        exact: returns scores (queries, n) before projection and storage.
    """
    if index.gradients is not None and not index.context.lossy:
        return 1.0  # every example is scored by its whole gradient: there is no first stage
    n = len(index.store)
    query = queries()
    found: list[float] = []
    for scores, candidates in zip(exact(query), index.candidates(query, TOP, None), strict=True):
        for sign in (1, -1):
            wanted = top_rows(scores, np.arange(n), TOP, sign).rows
            if len(wanted):
                found.append(float(np.isin(wanted, candidates).mean()))
    return round(float(np.mean(found)), 6) if found else 1.0
