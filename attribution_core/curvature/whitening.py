"""The basis in which rows lose least when they are sketched: training gradients as `W φ`, what they are multiplied with as `W⁻ᵀ v`.

With `W = (K + λ)⁻½ Qᵀ`, inner products are what they were, but errors are not. Along an axis with eigenvalue κ training gradients have a second
moment in proportion to κ, and solved queries `v = (K + λ)⁻¹ ∇m` one in proportion to `κ / (κ + λ)²`: in the parameters' own basis a few axes have nearly
all of the rows' length, and others nearly all of the queries', which a random projection, or a scale per row, mixes. Its error grows with the product
of both lengths, which is smallest where the second moments are in equal proportion, that is after scaling by `(κ + λ)⁻½` and its inverse.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution_core.gradients import LayerGradient, Rotation
from attribution_core.gradients.factors import coordinates
from attribution_core.projection import Projection


@dataclass(frozen=True)
class BlockWhitening:
    """`W` of one block.

    Attributes:
        rotation: `Q`.
        roots: `(K + λ)^½`, (groups, d_out, d_in).
    """

    rotation: Rotation
    roots: Tensor

    def of(self, gradient: LayerGradient) -> Tensor:
        """Return `W φ`, (batch, groups, d_out, d_in)."""
        return self.rotation.back(self.rotation.of(gradient) / self.roots.to(gradient.inputs.dtype))

    def against(self, matrices: Tensor) -> Tensor:
        """Return `W⁻ᵀ v`, what `W φ` is multiplied with, for `v` (…, groups, d_out, d_in)."""
        return self.rotation.back(self.rotation.forward(matrices) * self.roots.to(matrices.dtype))


@dataclass(frozen=True)
class Whitening:
    """`W`, block by block."""

    blocks: Sequence[BlockWhitening]

    def rows(self, gradients: Sequence[LayerGradient], projection: Projection) -> tuple[Tensor, Tensor]:
        """Return `P W φ` (batch, dim) and `‖W φ‖² = φᵀ (K + λ)⁻¹ φ` (batch,); a few gradients are formed at a time."""
        first = gradients[0].inputs
        rows, squares = first.new_zeros(len(first), projection.dim), first.new_zeros(len(first))
        for part, start, values in coordinates(gradients, self.blocks):
            rows[part] += projection.project_range(values, start)
            squares[part] += torch.linalg.vector_norm(values, dim=1).square()
        return rows, squares

    def queries(self, solved: Sequence[Tensor], projection: Projection) -> Tensor:
        """Return `P W⁻ᵀ v` (queries, dim)."""
        return projection.project(block.against(matrices) for matrices, block in zip(solved, self.blocks, strict=True))
