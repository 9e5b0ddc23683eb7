"""Removal curves: drop what a ranking puts first, retrain, and see what the measurement loses.

Source: Hooker et al. 2019 (ROAR); Park et al. 2023, section 5 (brittleness). Each query has its own ranking, so its own retrainings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.result import Result


@dataclass(frozen=True)
class RemovalCurve(Result):
    """What removing a ranking's first examples did.

    Attributes:
        removed: how many examples were removed, ascending, (sizes,).
        drop: `f(S) − f(S∖top-k)`, mean over queries that have a finished retraining, (sizes,).
        error: standard error of that mean over queries, (sizes,).
        area: mean drop under the curve from 0 removed to the most, by the trapezoidal rule over the number removed.
        diverged: retrainings left out.
    """

    removed: tuple[int, ...]
    drop: tuple[float, ...]
    error: tuple[float, ...]
    area: float
    diverged: int


@dataclass(frozen=True)
class RemovalResult(Result):
    """Curves of several rankings of the same queries, and areas against each baseline.

    Attributes:
        curves: by ranking's name.
        advantage: area of `ranking` minus area of each other one; above 0 where the ranking's removals hurt more.
        ranking: the judged ranking's name.
        queries: how many queries.
    """

    curves: Mapping[str, RemovalCurve]
    advantage: Mapping[str, float]
    ranking: str
    queries: int


def ranking_of(scores: np.ndarray) -> np.ndarray:
    """Return training rows from the most supportive on, (queries, n); equal scores in order of their rows."""
    return np.argsort(-scores, axis=1, kind="stable")


def random_ranking(queries: int, num_examples: int, seed: int) -> np.ndarray:
    """Return a random order of training rows for each query, (queries, n)."""
    generator = np.random.default_rng(seed)
    return generator.permuted(np.tile(np.arange(num_examples), (queries, 1)), axis=1)


def removal_masks(ranking: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return the subsets to retrain, (queries, sizes, n) bool: all but each query's first k examples.

    Raises:
        InvalidInputError: if sizes do not rise from at least 1 to less than n.
    """
    num_examples = ranking.shape[1]
    if list(sizes) != sorted(set(sizes)) or not sizes or sizes[0] < 1 or sizes[-1] >= num_examples:
        raise InvalidInputError(f"numbers of removed examples must rise and lie between 1 and {num_examples - 1}")
    masks = np.ones((len(ranking), len(sizes), num_examples), bool)
    for place, size in enumerate(sizes):
        np.put_along_axis(masks[:, place], ranking[:, :size], False, axis=1)
    return masks


def removal_curve(sizes: Sequence[int], values: np.ndarray, full: np.ndarray) -> RemovalCurve:
    """Return the curve of one ranking.

    Args:
        sizes: as `removal_masks` was given.
        values: each query's own measurement after its own retraining, (queries, sizes, seeds); not finite where that diverged.
        full: the measurements with all examples, (queries,).

    Raises:
        InvalidInputError: if no retraining of a size finished.
    """
    finished = np.isfinite(values)
    counts = finished.sum(2)
    means = np.where(finished, values, 0).sum(2) / np.maximum(counts, 1)
    drops = full[:, None] - means  # (queries, sizes)
    present = counts > 0
    if not present.any(0).all():
        raise InvalidInputError("every retraining of one size diverged: there is no curve")
    picked = [drops[present[:, place], place] for place in range(len(sizes))]
    drop = np.array([column.mean() for column in picked])
    error = [float(column.std(ddof=1) / np.sqrt(len(column))) if len(column) > 1 else float("nan") for column in picked]
    grid, heights = np.array([0, *sizes], float), np.array([0.0, *drop])
    area = float(((heights[1:] + heights[:-1]) / 2 * np.diff(grid)).sum() / grid[-1])
    return RemovalCurve(tuple(sizes), tuple(drop.tolist()), tuple(error), area, int((~finished).sum()))


def removal_result(
    sizes: Sequence[int], values: Mapping[str, np.ndarray], full: np.ndarray, ranking: str
) -> RemovalResult:
    """Compare a ranking's curve with those of others, such as `random` and `similarity`.

    Args:
        sizes: numbers of removed examples.
        values: by ranking's name, as for `removal_curve`.
        full: (queries,).
        ranking: name of the judged one.
    """
    curves = {name: removal_curve(sizes, given, full) for name, given in values.items()}
    advantage = {name: curves[ranking].area - curve.area for name, curve in curves.items() if name != ranking}
    return RemovalResult(curves, advantage, ranking, len(full))
