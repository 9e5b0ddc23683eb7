"""Cosine of gradients: `cos(∇m_z, φ_i)`, without unit.

Source: Hammoudeh & Lowd 2022 (GAS), with one checkpoint.
"""

import torch
from torch import Tensor

from attribution_core.data.batch import Batch
from attribution_core.methods.base import GradientMethod, QuerySide, TrainRows

_TINY = 1e-30


class GradCos(GradientMethod):
    """Rows and queries have unit length before projection."""

    linear = False

    def encode_train(self, batch: Batch) -> TrainRows:
        """Return projected unit gradients; an example's cosine with itself needs no measure and is stored as computed."""
        gradients = [-gradient.materialise() for gradient in self._loss_gradients(batch)]
        norms = _norms(gradients)
        own = self.encode_query(batch)
        rows = self.projection.project([gradient.flatten(1) for gradient in gradients]) / norms.unsqueeze(1)
        assert own.gradients is not None
        products = torch.stack([(a * b).flatten(1).sum(1) for a, b in zip(own.gradients, gradients, strict=True)]).sum(
            0
        )
        return TrainRows(rows, torch.ones_like(norms), products / norms / _norms(own.gradients))

    def precondition(self, query: QuerySide, damping: float) -> QuerySide:
        """Normalise the query's gradient."""
        assert query.gradients is not None
        norms = _norms(query.gradients).view(-1, 1, 1, 1)
        unit = [gradient / norms for gradient in query.gradients]
        return QuerySide(query.output, self.projection.project([gradient.flatten(1) for gradient in unit]), unit)

    def exact_scores(self, query: QuerySide, batch: Batch) -> Tensor:
        """Return the cosines without projection."""
        gradients = [-gradient.materialise() for gradient in self._loss_gradients(batch)]
        assert query.gradients is not None
        products = [a.flatten(1) @ b.flatten(1).T for a, b in zip(query.gradients, gradients, strict=True)]
        return torch.stack(products).sum(0) / _norms(gradients)


def _norms(gradients: list[Tensor]) -> Tensor:
    """Return the length of each example's whole gradient, (batch,)."""
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
    return squares.sqrt().clamp(min=_TINY)
