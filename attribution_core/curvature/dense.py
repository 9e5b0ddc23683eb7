"""Curvatures by eigenvectors over all attributed parameters at once: the whole matrix, or its leading part."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution_core.curvature.base import Curvature
from attribution_core.curvature.products import HessianProducts
from attribution_core.curvature.vectors import flattened, unflattened
from attribution_core.data.batch import Batch
from attribution_core.errors import InvalidInputError, SingularCurvatureError
from attribution_core.gradients import Block

MAX_EXPLICIT_PARAMETERS = 4096
_COLUMNS_AT_ONCE = 256


@dataclass(frozen=True)
class Spectral(Curvature):
    """`Σ u (uᵀv) / (λ_u + λ)` over known eigenvectors; what lies outside their span is left out.

    Attributes:
        values: eigenvalues of the mean loss's curvature, (r,).
        vectors: (P, r); all P for an explicit matrix.
        mean: mean eigenvalue over all P, in magnitude: the unit of damping.
    """

    values: Tensor
    vectors: Tensor
    mean: float
    blocks: Sequence[Block]

    @classmethod
    def from_arrays(cls, blocks: Sequence[Block], arrays: Mapping[str, np.ndarray], device: str) -> "Spectral":
        """Rebuild from stored arrays."""
        values, vectors = (torch.from_numpy(arrays[name]).to(device) for name in ("values", "vectors"))
        return cls(values, vectors, float(arrays["mean"][0]), blocks)

    def solve(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return `(H̄ + λ)⁻¹ v`.

        Raises:
            SingularCurvatureError: if a known eigenvalue plus λ is not positive.
        """
        damped = self.values + damping * self.mean
        if not bool((damped > 0).all()):
            raise SingularCurvatureError(
                f"the curvature is not positive definite (smallest eigenvalue {float(self.values.min()):.3g}, mean {self.mean:.3g}): "
                "use a larger damping, or gauss_newton",
                "/damping",
            )
        rows = flattened(gradients)
        solved = ((rows.to(self.vectors) @ self.vectors) / damped) @ self.vectors.T
        return unflattened(solved.to(rows), self.blocks)


def summed_hessian(products: HessianProducts, batches: Iterable[Batch], blocks: Sequence[Block]) -> np.ndarray:
    """Return `Σ_i H_i` over some batches, (P, P) float64.

    Raises:
        InvalidInputError: if the model has too many parameters.
    """
    size = sum(block.numel for block in blocks)
    if size > MAX_EXPLICIT_PARAMETERS:
        raise InvalidInputError(
            f"the model has {size:,} attributed parameters; an explicit curvature takes at most {MAX_EXPLICIT_PARAMETERS:,}",
            "/method/type",
        )
    like = next(products.capture.module.parameters())
    total = np.zeros((size, size))
    for batch in batches:
        for start in range(0, size, _COLUMNS_AT_ONCE):
            columns = torch.eye(size, dtype=like.dtype, device=like.device)[start : start + _COLUMNS_AT_ONCE]
            found = flattened(products.summed(batch, unflattened(columns, blocks)))
            total[start : start + _COLUMNS_AT_ONCE] += found.double().cpu().numpy()
    return total


def spectrum(hessian: np.ndarray) -> dict[str, np.ndarray]:
    """Return eigenvalues and eigenvectors of a symmetric matrix, and the eigenvalues' mean magnitude."""
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    return {"values": values, "vectors": vectors, "mean": np.array([np.abs(values).mean()])}
