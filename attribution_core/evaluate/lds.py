"""The linear datamodeling score: how well summed scores rank the outputs of real retrainings on random subsets.

`LDS = mean_z Spearman_j(f_z(S_j), Σ_{i ∈ S_j} τ_i(z))`. Source: Park et al. 2023, definition 2.3.
"""

from dataclasses import dataclass

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.ranks import percentiles, pooled_slope, ranks, spearman
from attribution_core.evaluate.result import Result
from attribution_core.evaluate.retrainings import Retrainings

_SPLITS = 20


@dataclass(frozen=True)
class LdsResult(Result):
    """A measured LDS.

    Attributes:
        lds: mean rank correlation.
        low: lower end of the bootstrap interval, drawn over queries and over subsets at once.
        high: its upper end.
        query_low: lower end of the interval drawn over queries alone: these subsets, other queries.
        query_high: its upper end.
        control: LDS of the same scores with training examples permuted, mean over permutations; around 0.
        control_low: lower end of the permutations' interval.
        control_high: its upper end.
        ceiling: what a perfect predictor of the expected output would reach; None with one seed, which cannot tell.
        slope: predicted on realised outputs, pooled within queries.
        removed_share: (smallest, largest) share of examples that a subset leaves out.
        subsets: how many subsets had a finished retraining.
        seeds: most seeds of a subset.
        queries: how many queries.
        diverged: retrainings left out.
        level: of the intervals.
        resampling: what the interval's draws replace.
        resamples: draws of the bootstrap.
        seed: of its generator.
    """

    lds: float
    low: float
    high: float
    query_low: float
    query_high: float
    control: float
    control_low: float
    control_high: float
    ceiling: float | None
    slope: float
    removed_share: tuple[float, float]
    subsets: int
    seeds: int
    queries: int
    diverged: int
    level: float
    resamples: int
    seed: int
    resampling: str = "queries and subsets, each with replacement"


def predicted_outputs(scores: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return `Σ_{i ∈ S_j} τ_i(z)`, (queries, subsets), up to a constant per query.

    Raises:
        InvalidInputError: if the two disagree on the number of training examples.
    """
    if scores.ndim != 2 or scores.shape[1] != masks.shape[1]:
        raise InvalidInputError(f"scores are {scores.shape}, but the subsets are of {masks.shape[1]} training examples")
    summed: np.ndarray = scores.astype(np.float64) @ masks.T.astype(np.float64)
    return summed


def correlations(scores: np.ndarray, retrainings: Retrainings) -> np.ndarray:
    """Return each query's rank correlation with the mean over seeds, (queries,)."""
    bank = retrainings.usable
    return spearman(predicted_outputs(scores, bank.masks), bank.means.T)


def linear_datamodeling_score(
    scores: np.ndarray, retrainings: Retrainings, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> LdsResult:
    """Measure the LDS of scores (queries, n) with its intervals, control, ceiling and slope."""
    bank = retrainings.usable
    generator = np.random.default_rng(seed)
    predicted, realised = predicted_outputs(scores, bank.masks), bank.means.T
    each = spearman(predicted, realised)
    low, high = percentiles(bootstrap_both(predicted, realised, resamples, generator), level)
    query_low, query_high = percentiles(bootstrap_queries(each, resamples, generator), level)
    control = permuted(scores, bank, max(resamples // 10, 20), generator)
    control_low, control_high = percentiles(control, level)
    shares = bank.removed_shares
    return LdsResult(
        lds=float(each.mean()),
        low=low,
        high=high,
        query_low=query_low,
        query_high=query_high,
        control=float(control.mean()),
        control_low=control_low,
        control_high=control_high,
        ceiling=ceiling(bank, seed=seed),
        slope=pooled_slope(predicted, realised),
        removed_share=(float(shares.min()), float(shares.max())),
        subsets=len(bank.masks),
        seeds=int(bank.counts.max()),
        queries=len(each),
        diverged=retrainings.diverged,
        level=level,
        resamples=resamples,
        seed=seed,
    )


def bootstrap_queries(each: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return means of correlations (queries,) over queries drawn with replacement, (resamples,)."""
    drawn: np.ndarray = each[generator.integers(0, len(each), (resamples, len(each)))].mean(1)
    return drawn


def bootstrap_both(
    predicted: np.ndarray, realised: np.ndarray, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Return LDS over queries and subsets drawn with replacement, (resamples,).

    A subset drawn twice ties with itself in both rankings, which adds agreement that is not there; so ranks are those among all subsets,
    and only their correlation is taken over the draw: weights instead of ties.

    Args:
        predicted: (queries, subsets).
        realised: (queries, subsets).
        resamples: how many draws.
        generator: draws.
    """
    queries, subsets = predicted.shape
    first, second = ranks(predicted), ranks(realised)
    weights = generator.multinomial(subsets, np.full(subsets, 1 / subsets), resamples) / subsets  # (resamples, subsets)
    means = [weights @ values.T for values in (first, second)]  # (resamples, queries)
    products = weights @ (first * second).T - means[0] * means[1]
    spreads = [weights @ (values**2).T - mean**2 for values, mean in zip((first, second), means, strict=True)]
    scale = np.sqrt(np.maximum(spreads[0] * spreads[1], 0))
    each = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    rows = generator.integers(0, queries, (resamples, queries))
    drawn: np.ndarray = np.take_along_axis(each, rows, 1).mean(1)
    return drawn


def permuted(scores: np.ndarray, bank: Retrainings, times: int, generator: np.random.Generator) -> np.ndarray:
    """Return LDS of scores whose training examples are permuted, (times,): what scores that know nothing get."""
    realised = bank.means.T
    return np.array(
        [
            spearman(predicted_outputs(scores[:, generator.permutation(scores.shape[1])], bank.masks), realised).mean()
            for _ in range(times)
        ]
    )


def ceiling(retrainings: Retrainings, *, seed: int = 0) -> float | None:
    """Return the LDS that a perfect predictor of the expected output would reach: the root of the truth's reliability.

    Half of the seeds against the other half gives the reliability r of a half; Spearman and Brown's formula `2r / (1 + r)` that of all.
    None where no two seeds of the same subsets finished. Source: Spearman 1910; Brown 1910.
    """
    bank = retrainings.usable
    whole = bank.of(np.flatnonzero(bank.finished.all(1)))
    subsets, seeds, _ = whole.values.shape
    if seeds < 2 or subsets < 2:
        return None
    generator, halves = np.random.default_rng(seed), []
    for _ in range(_SPLITS):
        order, half = generator.permutation(seeds), seeds // 2
        first, second = (whole.values[:, part].mean(1).T for part in (order[:half], order[half : 2 * half]))
        halves.append(float(spearman(first, second).mean()))
    reliability = max(float(np.mean(halves)), 0.0)
    return float(np.sqrt(2 * reliability / (1 + reliability)))
