"""Cosine of gradients: `cos(∇m_z, φ_i)`, without unit; weighted by learning rates and summed over checkpoints it is GAS.

Source: Hammoudeh & Lowd 2022.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attribution_core.curvature import Identity
from attribution_core.curvature.fisher import Observed
from attribution_core.gradients import LayerGradient
from attribution_core.methods.base import Checkpoint, GradientMethod, QuerySide, TrainRows
from attribution_core.projection import Projection


class GradCos(GradientMethod):
    """Rows and queries have unit length before projection; a gradient of zero stays zero.

    Args:
        weight: what cosines are multiplied with, on the query side.
    """

    linear = False
    shared = False

    def __init__(self, checkpoint: Checkpoint, projection: Projection, weight: float = 1.0) -> None:
        super().__init__(checkpoint, Identity(), 0.0, projection)
        self.weight = weight

    def encode_observed(self, observed: Observed) -> TrainRows:
        """Return projected unit `φ_i`, and the cosine of each with the gradient of its own measurement."""
        assert self.projection is not None
        unit = unit_length([gradient.materialise() for gradient in observed.training])
        own = unit_length([gradient.materialise() for gradient in observed.measured])
        rows = self.projection.project(unit)
        return TrainRows(rows, torch.ones_like(rows[:, 0]), self.weight * _paired(own, unit))

    def precondition(self, query: QuerySide, damping: float) -> QuerySide:
        """Normalise the query's gradient, and weight it."""
        assert self.projection is not None
        weighted = [self.weight * unit for unit in unit_length([part.materialise() for part in query.measured])]
        return QuerySide(query.output, self.projection.project(weighted), weighted)

    def scores_of(self, query: QuerySide, training: Sequence[LayerGradient]) -> Tensor:
        """Return the weighted cosines without projection."""
        assert query.gradients is not None
        unit = unit_length([gradient.materialise() for gradient in training])
        return torch.stack([a.flatten(1) @ b.flatten(1).T for a, b in zip(query.gradients, unit, strict=True)]).sum(0)


def unit_length(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return each example's whole gradient divided by its length.

    Gradients of well-fitted examples are so small that their squares underflow; the largest entry is divided out first.
    """
    largest = torch.stack([gradient.flatten(1).abs().amax(1) for gradient in gradients]).amax(0).view(-1, 1, 1, 1)
    scaled = [gradient / largest.where(largest > 0, 1) for gradient in gradients]
    length = _paired(scaled, scaled).sqrt().view(-1, 1, 1, 1)
    return [gradient / length.where(length > 0, 1) for gradient in scaled]


def _paired(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).flatten(1).sum(1) for a, b in zip(first, second, strict=True)]).sum(0)
