"""Finding wrong labels by self-influence: the area under the ROC curve of `τ_i(z_i)` for known flips.

Source: Koh & Liang 2017, section 5.4. `AUC = P(score of a flipped > score of a clean example)`, ties half (Mann & Whitney 1947).
"""

from dataclasses import dataclass

import numpy as np

from attribution_core.errors import InvalidInputError
from attribution_core.evaluate.ranks import percentiles, ranks
from attribution_core.evaluate.result import Result


@dataclass(frozen=True)
class MislabelResult(Result):
    """How well self-influence finds wrong labels.

    Attributes:
        auc: area under the ROC curve; 0.5 by chance.
        low: lower end of the bootstrap interval over flipped and clean examples, each drawn with replacement.
        high: its upper end.
        recall: share of the flipped that are among as many top examples as there are flipped.
        flipped: how many labels are wrong.
        examples: how many examples were ranked.
        level: of the interval.
        resamples: draws.
        seed: of the generator.
    """

    auc: float
    low: float
    high: float
    recall: float
    flipped: int
    examples: int
    level: float
    resamples: int
    seed: int


def plant_flips(labels: np.ndarray, classes: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels with a share of them moved to another class at random, and which were, (n,) bool.

    Raises:
        InvalidInputError: if nothing or everything would be flipped.
    """
    count = round(share * len(labels))
    if not 0 < count < len(labels) or classes < 2:
        raise InvalidInputError("a share of labels between none and all must be flipped, among at least two classes")
    generator = np.random.default_rng(seed)
    rows = generator.choice(len(labels), count, replace=False)
    moved = labels.copy()
    moved[rows] = (labels[rows] + generator.integers(1, classes, count)) % classes
    flipped = np.zeros(len(labels), bool)
    flipped[rows] = True
    return moved, flipped


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the area under the ROC curve of scores (n,) for positive (n,) bool.

    Raises:
        InvalidInputError: if either class is empty.
    """
    hits = int(positive.sum())
    misses = len(positive) - hits
    if hits == 0 or misses == 0:
        raise InvalidInputError("an area under the ROC curve needs examples of both kinds")
    total = float((ranks(scores[None].astype(np.float64))[0] + 1)[positive].sum())
    return (total - hits * (hits + 1) / 2) / (hits * misses)


def mislabel_auc(
    self_influence: np.ndarray, flipped: np.ndarray, *, level: float = 0.95, resamples: int = 500, seed: int = 0
) -> MislabelResult:
    """Measure how well self-influence (n,) finds the flipped (n,) bool."""
    value = auc(self_influence, flipped)
    generator = np.random.default_rng(seed)
    wrong, clean = self_influence[flipped], self_influence[~flipped]
    truth = np.repeat([True, False], [len(wrong), len(clean)])
    draws = [
        auc(np.concatenate([generator.choice(wrong, len(wrong)), generator.choice(clean, len(clean))]), truth)
        for _ in range(resamples)
    ]
    low, high = percentiles(np.array(draws), level)
    top = np.argsort(-self_influence, kind="stable")[: len(wrong)]
    return MislabelResult(
        auc=value,
        low=low,
        high=high,
        recall=float(flipped[top].mean()),
        flipped=len(wrong),
        examples=len(flipped),
        level=level,
        resamples=resamples,
        seed=seed,
    )
