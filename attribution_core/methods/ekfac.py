"""Influence functions with EK-FAC curvature.

Rows are projections of the raw gradient, and the inverse curvature acts on the query's full gradient before it is projected. Nothing
stored depends on the damping, and re-scoring with exact gradients takes the projection's noise out of the answer.

Sources: Koh & Liang 2017; Grosse et al. 2023.
"""

from torch import Tensor

from attribution_core.curvature import EkfacFactors
from attribution_core.methods.base import Checkpoint, GradientMethod
from attribution_core.projection import Projection


class Ekfac(GradientMethod):
    """`τ_i = (1/n) ∇mᵀ (H̄ + λ)⁻¹ φ_i` with `H̄` by EK-FAC."""

    def __init__(self, checkpoint: Checkpoint, projection: Projection, factors: EkfacFactors, damping: float) -> None:
        super().__init__(checkpoint, projection)
        self.factors = factors
        self.default_damping = damping

    def solve(self, gradients: list[Tensor], damping: float | None) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v`, λ a multiple of each layer's mean eigenvalue.

        Raises:
            SingularCurvatureError: if the curvature is singular at this damping.
        """
        return self.factors.solve(gradients, self.default_damping if damping is None else damping)
