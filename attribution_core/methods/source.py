"""SOURCE: the training unrolled, its gradients and curvature taken to be constant over each of a few segments.

Over a segment of K steps at learning rate η̄ with curvature `H̄`, what a small change of the weights becomes is `S = exp(-η̄ K H̄)`, and
having example i adds `r_i = (1/n) (1 - exp(-η̄ K H̄)) H̄⁻¹ φ̄_i`. So `τ_i(z) = Σ_l ∇m_z(θ_T)ᵀ (Π_{l' > l} S_l') r_{l,i}`: both functions of the
curvature go to the query side, and rows are the training gradients of each checkpoint.

Source: Bae et al. 2024, Training Data Attribution via Approximate Unrolled Differentiation, section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attribution_core.curvature import Curvature, EkfacFactors
from attribution_core.curvature.fisher import Observed
from attribution_core.data.batch import Batch
from attribution_core.methods.base import Checkpoint, GradientMethod, QuerySide
from attribution_core.projection import Projection


class Unrolled(Curvature):
    """What one segment's steps, and those of the segments after it, make of a gradient.

    Args:
        segments: the curvature and the time `η̄ K` of this segment and of all later ones, in order.
        l2: strength of the penalty `l2/2 ‖θ‖²` that training had.
        weight: what results are multiplied with.
    """

    def __init__(self, segments: Sequence[tuple[EkfacFactors, float]], l2: float, weight: float) -> None:
        self.segments, self.l2, self.weight = list(segments), l2, weight

    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return `(1 - exp(-η̄ K H̄)) H̄⁻¹ Π_{l'} exp(-η̄_l' K_l' H̄_l') v`, whatever the damping: nothing is inverted that could be singular."""
        (own, time), *later = self.segments
        moved = list(gradients)
        for factors, duration in reversed(later):
            moved = factors.multiplied(
                moved, [torch.exp(-duration * (values + self.l2)) for values in factors.eigenvalues]
            )
        return own.multiplied(moved, [self.weight * _gained(values + self.l2, time) for values in own.eigenvalues])


class Source(GradientMethod):
    """One checkpoint of a training.

    Args:
        checkpoint: whose training gradients are compared.
        curvature: of its segment and those after it.
        projection: of stored rows and queries; None where gradients are stored whole.
        end: the run's last checkpoint, where queries are measured.
    """

    def __init__(
        self, checkpoint: Checkpoint, curvature: Unrolled, projection: Projection | None, end: Checkpoint
    ) -> None:
        super().__init__(checkpoint, curvature, 0.0, projection)
        self.end = GradientMethod(end, curvature, 0.0, projection)

    def encode_query(self, batch: Batch) -> QuerySide:
        """Return `∇m_z(θ_T)` per block."""
        return self.end.encode_query(batch)

    def _own_influence(self, observed: Observed) -> Tensor:
        measured = self.end.observe(observed.batch).measured
        return self.curvature.paired(measured, observed.training, 0.0)


def _gained(values: Tensor, time: float) -> Tensor:
    """Return `(1 - exp(-t σ)) / σ`, which is t where σ is 0."""
    positive = values > 0
    safe = torch.where(positive, values, 1.0)
    return torch.where(positive, -torch.expm1(-time * safe) / safe, time)
