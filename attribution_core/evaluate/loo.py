"""Leave-one-out effects: predicted scores beside refits without one example.

Source: Koh & Liang 2017, section 4.2: `f(S) − f(S∖{i})` against `τ_i`.
"""

from dataclasses import dataclass

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.ranks import pearson, pooled_slope, spearman
from attribution_core.evaluate.result import Result
from attribution_core.evaluate.retrainings import Retrainings


@dataclass(frozen=True)
class LooResult(Result):
    """Agreement of scores with leave-one-out effects.

    Attributes:
        correlation: Pearson's, mean over queries.
        rank_correlation: Spearman's, mean over queries.
        slope: predicted on realised effects, pooled within queries.
        examples: examples that were left out one at a time.
        queries: how many queries.
        seeds: most seeds of a refit.
        diverged: retrainings left out.
    """

    correlation: float
    rank_correlation: float
    slope: float
    examples: int
    queries: int
    seeds: int
    diverged: int


def leave_one_out(scores: np.ndarray, retrainings: Retrainings, full: np.ndarray) -> LooResult:
    """Compare scores with leave-one-out retrainings.

    Args:
        scores: (queries, n).
        retrainings: every mask leaves out exactly one example.
        full: the measurements with all examples, mean over seeds, (queries,).

    Raises:
        InvalidInputError: if a mask leaves out another number of examples.
    """
    if not ((~retrainings.masks).sum(1) == 1).all():
        raise InvalidInputError("every mask of a leave-one-out comparison leaves out exactly one example")
    bank = retrainings.usable
    left_out = (~bank.masks).argmax(1)
    predicted = scores[:, left_out].astype(np.float64)  # (queries, examples)
    realised = full[:, None] - bank.means.T
    return LooResult(
        correlation=float(pearson(predicted, realised).mean()),
        rank_correlation=float(spearman(predicted, realised).mean()),
        slope=pooled_slope(predicted, realised),
        examples=len(left_out),
        queries=len(scores),
        seeds=int(bank.counts.max()),
        diverged=retrainings.diverged,
    )
