"""The small contract between a kind of model and everything that attributes it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError
from attribution_core.random_numbers import hashed

FisherKind = Literal["exact", "sampled", "empirical"]


class Task(ABC):
    """Losses and measurements of one kind of model; everything is per example, shape (batch,)."""

    measurements: tuple[str, ...]
    default_measurement: str

    @abstractmethod
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the training loss ℓ of every example."""

    @abstractmethod
    def measure(self, output: Tensor, batch: Batch, measurement: str) -> Tensor:
        """Return the measurement m; higher means that the model is more behind the output (`loss`: less)."""

    def slope(self, output: Tensor, batch: Batch, measurement: str) -> Tensor | None:
        """Return `∂ℓ/∂m` (batch,) where the loss is a function of the measurement alone, else None.

        Loss gradients then are the measurement's, scaled; for margins this is also more exact, as a confident model's loss gradient
        is the difference of nearly equal numbers.
        """
        return None

    def shortfall(self, output: Tensor, batch: Batch) -> Tensor | None:
        """Return `1 - p` of each example's target (batch,), to which its loss gradient is proportional; None where an example has no such number."""
        return None

    @abstractmethod
    def log_odds(self, output: Tensor, batch: Batch) -> Tensor:
        """Return TRAK's model output `f = log p/(1-p)` of the target; the prediction itself for regression."""

    @abstractmethod
    def residual(self, output: Tensor, batch: Batch) -> Tensor:
        """Return `-∂ℓ/∂f` for TRAK's `f`: `1 - p`, or `target - prediction` for regression."""

    @abstractmethod
    def pseudo_losses(
        self, output: Tensor, batch: Batch, kind: FisherKind, seed: int, samples: int
    ) -> Iterator[Tensor]:
        """Yield losses (batch,) whose per-example gradients g satisfy `Σ g gᵀ` = the example's Fisher matrix.

        Args:
            output: the model's output.
            batch: the examples; their row numbers seed the sampled labels, so these depend on nothing else.
            kind: `exact` enumerates the labels, `sampled` draws them from the model, `empirical` takes the data's.
            seed: of the sampled labels.
            samples: labels drawn per example.
        """

    @abstractmethod
    def describe(self, output: Tensor, batch: Batch, measurement: str) -> list[dict[str, Any]]:
        """Return `{"value", "prediction", "probability"}` of every example."""

    @abstractmethod
    def check(self, output: Tensor, batch: Batch) -> None:
        """Refuse targets that do not fit the output.

        Raises:
            InvalidInputError: if the output's shape or a target is impossible.
        """

    def directions(self, output: Tensor) -> Tensor | None:
        """Return vectors `b`, (batch, count, outputs), with `Σ b bᵀ` = each example's Fisher matrix by its output, the long ones few.

        None where no choice of vectors is shorter than the labels' own.
        """
        return None

    def exact_labels(self, output: Tensor) -> int | None:
        """Return how many labels `exact` would enumerate, None if it cannot."""
        return None


def required_targets(batch: Batch) -> Tensor:
    """Return the batch's targets.

    Raises:
        InvalidInputError: if it has none.
    """
    if batch.targets is None:
        raise InvalidInputError("this needs a target, and the data has none")
    return batch.targets


def log_odds_of(log_probability: Tensor, log_rest: Tensor | None = None) -> Tensor:
    """Return `log p/(1-p)` from log p, and from log(1-p) where it is known more exactly."""
    if log_rest is None:
        # log(1 - e^x) is taken where it is stable; p = 1 to within rounding would otherwise give an infinite value.
        tiny = torch.finfo(log_probability.dtype).eps
        log_rest = torch.log(-torch.expm1(log_probability.clamp(max=-tiny)))
    return log_probability - log_rest


def uniforms(seed: int, draw: int, rows: Tensor, count: int) -> Tensor:
    """Return numbers in [0, 1), (batch, count), that depend on seed, draw and row number only."""
    keys = rows.cpu().numpy().astype(np.int64).view(np.uint64)[:, None] * np.uint64(1 << 24) + np.arange(
        count, dtype=np.uint64
    )
    bits = hashed(seed * 1_000_003 + draw, keys)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) / 2**53).to(rows.device)


def sampled_labels(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw a label per row by inverting the cumulative distribution: (…, classes) and (…) to (…) int64."""
    cumulative = probabilities.double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
    return drawn.clamp(max=probabilities.shape[-1] - 1)
