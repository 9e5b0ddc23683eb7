"""How much of the exact top-k the first search stage finds, measured when an index is built."""

import numpy as np

from attribution_core.methods.loaded import LoadedIndex, top_rows
from attribution_core.progress import Progress

QUERIES = 16
TOP = 10


def measured_recall(index: LoadedIndex, progress: Progress) -> float:
    """Return the mean share of the exact top 10 of both signs among the candidates, over training rows as queries.

    The queries are spread evenly over the training set; the exact scan uses unprojected scores where the method has them.
    """
    if index.gradients is not None:
        return 1.0  # every example is scored by its whole gradient: there is no first stage
    n = len(index.store)
    rows = np.unique(np.linspace(0, n - 1, min(QUERIES, n)).astype(np.int64))
    query = index.query(index.context.source.batch(rows), None)
    exact = index.scores(query, np.arange(n), rescore=True, progress=progress)  # (queries, n)
    candidates = index.candidates(query, TOP, None)
    found: list[float] = []
    for number in range(len(rows)):
        for sign in (1, -1):
            wanted = top_rows(exact[number], np.arange(n), TOP, sign).rows
            if len(wanted):
                found.append(float(np.isin(wanted, candidates[number]).mean()))
    return round(float(np.mean(found)), 6) if found else 1.0
