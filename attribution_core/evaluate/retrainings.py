"""What retraining on subsets gave, with diverged trainings left out and counted."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attribution_core.errors import InvalidInputError


@dataclass(frozen=True)
class Retrainings:
    """Measurements of models retrained on subsets.

    A retraining with any measurement that is not finite has diverged: all its measurements are left out and `diverged` counts it.

    Attributes:
        masks: which examples each subset keeps, (subsets, n) bool.
        values: the queries' measurements, (subsets, seeds, queries) float64.
    """

    masks: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.masks.ndim != 2 or self.values.ndim != 3 or len(self.masks) != len(self.values):
            raise InvalidInputError("masks must be (subsets, n) and values (subsets, seeds, queries)")
        if self.masks.dtype != bool:
            raise InvalidInputError("masks must be booleans: true where an example is kept")

    @cached_property
    def finished(self) -> np.ndarray:
        """Which retrainings did not diverge, (subsets, seeds) bool."""
        return np.asarray(np.isfinite(self.values).all(2))

    @property
    def diverged(self) -> int:
        """How many retrainings were left out."""
        return int((~self.finished).sum())

    @cached_property
    def usable(self) -> "Retrainings":
        """These retrainings without the subsets of which every seed diverged.

        Raises:
            InvalidInputError: if fewer than two subsets are left.
        """
        kept = self.finished.any(1)
        if kept.sum() < 2:
            raise InvalidInputError("fewer than two subsets have a retraining that did not diverge")
        return self if kept.all() else self.of(np.flatnonzero(kept))

    @cached_property
    def counts(self) -> np.ndarray:
        """How many seeds of each subset finished, (subsets,)."""
        return np.asarray(self.finished.sum(1))

    @cached_property
    def means(self) -> np.ndarray:
        """Mean over finished seeds, (subsets, queries); NaN where none finished."""
        total = np.where(self.finished[:, :, None], self.values, 0).sum(1)
        return np.where(self.counts[:, None] > 0, total / np.maximum(self.counts, 1)[:, None], np.nan)

    @property
    def removed_shares(self) -> np.ndarray:
        """What share of the training set each subset leaves out, (subsets,)."""
        return np.asarray(1 - self.masks.mean(1))

    def of(self, subsets: np.ndarray) -> "Retrainings":
        """Return the retrainings of some subsets."""
        return Retrainings(self.masks[subsets], self.values[subsets])

    def single_seed(self, generator: np.random.Generator) -> "Retrainings":
        """Return one finished seed of each subset, drawn at random; subsets without any stay diverged."""
        keys = np.where(self.finished, generator.random(self.finished.shape), -1.0)
        chosen = keys.argmax(1)
        return Retrainings(self.masks, self.values[np.arange(len(chosen)), chosen][:, None])

    def seed_variance(self) -> np.ndarray | None:
        """Return the variance of one retraining around its subset's mean, pooled over subsets, (queries,); None without two seeds of any subset."""
        freedom = int((self.counts - 1).clip(0).sum())
        if freedom == 0:
            return None
        gaps = np.where(self.finished[:, :, None], self.values - self.means[:, None], 0)
        return np.asarray((gaps**2).sum((0, 1)) / freedom)
